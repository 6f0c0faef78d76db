"""The inputs that tell a run what to do, beside its tokens, and the sizes of runs (contract §1.1 and §4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from backends.ai100.violation import Violation

RUN_INPUTS: dict[str, list[str | int]] = {
    "comp_ctx_lengths": ["comp_ctx_lengths"],
    "batch_index": ["batch_size", 1],
    "num_logits_to_keep": ["num_logits_to_keep", 1],
    "lora_ids": ["batch_size", 1],
}
"""What a run may be given behind the states, int64, in order."""

_AT_MOST = {"comp_ctx_lengths": "ctx_len", "num_logits_to_keep": "seq_len"}
"""Sizes of a run that another size of it bounds."""


def run_interface(inputs: Mapping[str, Any]) -> Iterator[Violation]:
    """Types and shapes of these inputs."""
    for name, wanted in RUN_INPUTS.items():
        given = inputs.get(name)
        if given is not None and (given.dtype != np.int64 or list(given.shape or []) != wanted):
            sizes = ", ".join(map(str, wanted))
            yield Violation("dtype-shape", f"{name} is {given.dtype} {given.shape}, not int64 [{sizes}]")


def sizes_of_runs(entries: Sequence[Mapping[str, str]]) -> Iterator[Violation]:
    """No run reads more slots than there are, or returns the logits of more tokens than it takes."""
    for index, entry in enumerate(entries):
        for name, bound in _AT_MOST.items():
            if name in entry and bound in entry and int(entry[name]) > int(entry[bound]):
                yield Violation(
                    "run-sizes",
                    f"specialization {index} has {name} {entry[name]}, more than its {bound} {entry[bound]}: lower it",
                )


def one_prefix(prefixes: Mapping[str, str | None]) -> Iterator[Violation]:
    """All states have one prefix, by which a host selects them, or none (§1.2).

    Args:
        prefixes: That of each state by name.
    """
    if len(set(prefixes.values())) > 1:
        found = ", ".join(sorted({prefix or "none" for prefix in prefixes.values()}))
        yield Violation("inputs", f"the states have the prefixes {found}: give all of them one")
