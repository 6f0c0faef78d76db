"""What the stock pipelines make of models, as numbers of nodes: no pass does more or less than it did.

Numbers tell of a node too many, where answers do not: zeros written twice, a product that is no longer fused.
`node_counts.json` has what they were when somebody last looked. ``python -m tests.passes.test_node_counts`` writes it
anew for a change that is meant; the difference is a part of what is reviewed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests import support

FILE = Path(__file__).with_name("node_counts.json")
MODELS = ("llama", "gpt2", "gemma2", "bloom", "mixtral", "gpt-oss", "falcon-h1")
BEFORE = {"": "", " with adapters": "lora{bias=targets},"}
CASES = {
    f"{name} on {target}{what}": (name, steps + support.rest_of(target))
    for name in MODELS
    for target in ("onnxruntime", "ai100")
    for what, steps in BEFORE.items()
    if not steps or name == "llama"
}
"""The models and their pipelines, by name."""


def counts(case: str) -> dict[str, int]:
    """Nodes of each operator at the end of a pipeline."""
    name, steps = CASES[case]
    module = support.canonical(name)
    support.apply(module, steps)
    return dict(sorted(Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in module.graph).items()))


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_makes_the_nodes_that_it_made(case: str) -> None:
    expected = json.loads(FILE.read_text())
    assert list(expected) == list(CASES)
    assert counts(case) == expected[case]


if __name__ == "__main__":
    lines = (f"  {json.dumps(case)}: {json.dumps(counts(case))}" for case in CASES)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
