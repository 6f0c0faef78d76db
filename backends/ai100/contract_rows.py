"""What the AI 100 contract says of caches with rows of their own, of which a run names some (§1.1, §2 and §4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_graphsurgeon as gs

from backends.ai100.violation import Violation

# Written out again: this module checks what the others make, and shares no names with them.
_INDEX = "batch_index"
_ROWS = "full_batch_size"
_INDEXED = frozenset({"CtxScatterCB", "CtxScatterCB3D", "CtxGatherCB", "CtxGatherCB3D", "CtxGatherBlockedKVCB"})
_TABLES = "CtxScatterCB3D"
"""Writes tables of bits in any package (§1.3)."""
_OWN = frozenset({"CtxScatter", "CtxGather", "CtxGatherBlockedKV"})
"""Cache operators that take the rows of a cache from `_INDEX`, and those whose rows are those of the run."""


def rows_of_caches(graph: gs.Graph, entries: Sequence[Mapping[str, str]]) -> Iterator[Violation]:
    """Caches with rows of their own are read and written in those that `_INDEX` names, and have room for each run."""
    ends: list[Any] = [*graph.inputs, *graph.outputs]
    nodes: list[Any] = list(graph.nodes)
    kept = {tensor.name for tensor in ends}
    named = _INDEX in kept
    for node in nodes:
        rows = node.inputs[1].name if node.op in _INDEXED and len(node.inputs) > 1 else None
        if named and node.op in _OWN and node.inputs[0].name in kept:
            yield Violation("cache-rows", f"{node.op} {node.outputs[0].name} does not look at {_INDEX}: emit again")
        elif node.op in _INDEXED and rows != _INDEX and (named or node.op != _TABLES):
            yield Violation("cache-rows", f"{node.op} {node.outputs[0].name} takes rows of {rows}, not of {_INDEX}")
    if not named:
        return
    sizes = {entry.get(_ROWS) for entry in entries}
    if len(sizes) > 1:
        found = ", ".join(sorted(map(str, sizes)))
        yield Violation("cache-rows", f"{_ROWS} is {found}: the caches have as many rows in each specialization")
    for number, entry in enumerate(entries):
        if int(entry.get("batch_size", 0)) > int(entry.get(_ROWS, 0)):
            yield Violation(
                "cache-rows",
                f"specialization {number} runs {entry.get('batch_size')} rows, more than the {entry.get(_ROWS)} of the "
                "caches",
            )
