"""What each pass does to the smallest decoder that it fires on, as text: ``texts/<pass>.diff``.

The files are to be read: they show the IR before and after. ``python -m tests.passes.test_texts`` writes them anew; a
change in one is meant, and reviewed.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import to_text
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.specialize import specialize
from qeff_ir.testing.build import build
from qeff_ir.testing.recipe import Layer, Recipe

TEXTS = Path(__file__).with_name("texts")
OPTIONS = CompileOptions(prefill_seq_len=2, ctx_len=8)
PLAIN = Recipe()
ROTATED = Recipe(rotary="half")
# The recipe, the target whose stock pipeline leads to the pass, and the pass.
CASES: dict[str, tuple[Recipe, str, str]] = {
    "canonicalize": (PLAIN, "onnxruntime", "canonicalize"),
    "unflatten": (Recipe(gemm=True, bias=True), "onnxruntime", "unflatten"),
    "fuse-norms": (PLAIN, "onnxruntime", "fuse-norms"),
    "fuse-rotary": (ROTATED, "onnxruntime", "fuse-rotary"),
    "fuse-activations": (PLAIN, "onnxruntime", "fuse-activations"),
    "fuse-products": (PLAIN, "onnxruntime", "fuse-products"),
    "replicate-kv-heads": (Recipe(group=2), "onnxruntime", "replicate-kv-heads{n=2}"),
    "last-logits": (PLAIN, "onnxruntime", "last-logits"),
    "last-logits-of-drafts": (PLAIN, "onnxruntime", "last-logits{keep=3}"),
    "embedding-output": (PLAIN, "onnxruntime", "last-logits,embedding-output{normalize=true dim=2}"),
    "token-embedding": (PLAIN, "onnxruntime", "token-embedding"),
    "lora": (PLAIN, "onnxruntime", 'lora{mode=slots n=1 rank=2 targets="q"}'),
    "kv-retention-tensor-scatter": (PLAIN, "onnxruntime", "kv-retention{layout=tensor-scatter}"),
    "kv-retention-scatter": (PLAIN, "ai100", "kv-retention{layout=scatter}"),
    "kv-retention-ring": (Recipe((Layer(window=3),)), "ai100", "kv-retention{layout=scatter}"),
    "compute-context-length": (PLAIN, "ai100", 'compute-context-length{prefill="4,8" decode="4,8"}'),
    "continuous-batching-scatter": (Recipe((Layer(), Layer(linear="delta"))), "ai100", "continuous-batching{rows=2}"),
    "continuous-batching-tensor-scatter": (PLAIN, "onnxruntime", "continuous-batching{rows=2}"),
    "attention-grouped": (Recipe(group=2), "ai100", "attention{impl=grouped}"),
    "blocked-attention": (PLAIN, "onnxruntime", "blocked-attention{num-kv-blocks=2}"),
    "gather-blocks": (PLAIN, "ai100", "blocked-attention{num-kv-blocks=2},gather-blocks"),
    "ort-attention": (Recipe(head_dim=8, value_dim=8), "onnxruntime", "ort-attention"),
    "ort-rotary": (Recipe(head_dim=16, value_dim=16, rotary="half"), "onnxruntime", "ort-rotary"),
    "ort-packed-attention": (Recipe(head_dim=16, value_dim=16, rotary="half"), "onnxruntime", "ort-packed-attention"),
    "ort-kernels": (PLAIN, "onnxruntime", "ort-kernels"),
    "legalize": (ROTATED, "ai100", "legalize"),
    "sampling": (PLAIN, "onnxruntime", "sampling{pdfs=true top=4 guided=true}"),
}
PLACES = {
    "blocked-attention": "attention",
    "compute-context-length": "attention",
    "continuous-batching": None,
    "sampling": None,
}
"""Before which pass of a stock pipeline a pass runs that has no place in it, `None` for the end; others run before
``last-logits``."""


def start(case: str) -> tuple[Module, Pipeline]:
    """The module that the pass is given, and the pass."""
    recipe, target, text = CASES[case]
    stock, own = Pipeline.parse(find_backend(target).pipeline), Pipeline.parse(text)
    names = [item.name for _, item in stock]
    name = next(item.name for _, item in own)
    place = name if name in names else PLACES.get(name, "last-logits")
    end = len(names) if place is None else names.index(place)
    module = build(recipe).module
    specialize(module, OPTIONS)
    run_pipeline(module, Pipeline(stock.passes[:end]))
    return module, own


def changes(case: str) -> str:
    """What the pass does, as a diff of the text form."""
    module, own = start(case)
    before = to_text(module, origins=False).splitlines()
    run_pipeline(module, own, check=2)
    after = to_text(module, origins=False).splitlines()
    lines = difflib.unified_diff(before, after, f"{case}: before", "after", lineterm="", n=1)
    return "\n".join(line for line in lines if not line.startswith("@@")) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_a_pass_does_what_its_text_shows(case: str) -> None:
    made = changes(case)
    new = [line for line in made.splitlines()[2:] if line.startswith("+") and not line.startswith("+properties")]
    assert new  # it fires
    assert made == (TEXTS / f"{case}.diff").read_text()


def test_no_text_is_of_no_pass() -> None:
    assert {path.stem for path in TEXTS.iterdir()} == set(CASES)


if __name__ == "__main__":
    for known in TEXTS.glob("*.diff"):
        known.unlink()
    for name in CASES:
        (TEXTS / f"{name}.diff").write_text(changes(name))
