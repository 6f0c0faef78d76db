"""Broadcasting by the batch: a table that rows shared, ``[seq, ctx]``, has become one for each, ``[batch, seq, ctx]``.

What is computed from it point by point gains the batch as its first axis. Where it meets tensors of more axes, sizes of
1 are put behind the batch's: broadcasting aligns last axes, and would take the batch for heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node

from qeff_ir.errors import UnsupportedModelError

_aten = torch.ops.aten
_UNTAGGED = (_aten.expand, _aten.masked_fill, _aten.__and__, _aten.__or__, _aten.__xor__, _aten._to_copy, _aten.to)
"""Ops that go point by point, or broadcast, and do not say so."""


@dataclass(frozen=True)
class _Gained:
    """A tensor that has the batch now.

    Attributes:
        rank: Number of axes that it had.
        axes: How many it has gained: one, or none where a size of 1 had been put first for the batch.
    """

    rank: int
    axes: int


def align(made: Node, inputs: Iterable[Node]) -> None:
    """Put what is missing between the batch's axis and the others, wherever a table goes point by point.

    Args:
        made: The table by rows; its users still have the example values that they had without the batch.
        inputs: Of the graph: first axes whose size is open are the batch.

    Raises:
        UnsupportedModelError: The batch has no place in a result.
    """
    sizes = (node.meta["val"].shape[0] for node in inputs if node.meta["val"].dim())
    batch = {str(size) for size in sizes if not isinstance(size, int)}
    gained = {made: _Gained(made.meta["val"].dim() - 1, 1)}
    for node in list(made.graph.nodes):
        tables = [n for n in node.all_input_nodes if n in gained]
        if not tables or node.op != "call_function":
            continue
        if node.target is _aten.unsqueeze.default:
            gained[node] = _unsqueeze(node, gained[tables[0]])
        elif _is_pointwise(node):
            value = node.meta["val"]
            there = str(value.shape[0]) in batch
            first = any(gained[n] == _Gained(value.dim(), 0) for n in tables)
            result = _Gained(value.dim(), 0 if there or first else 1)
            for table in tables:
                missing = result.rank + result.axes - gained[table].rank - gained[table].axes
                node.replace_input_with(table, _spread(table, node, missing))
            if not there:
                gained[node] = result


def _unsqueeze(node: Node, table: _Gained) -> _Gained:
    """Let a size of 1 that is put first be the batch's axis, once; those behind it move on."""
    axis = cast(int, node.args[1]) % (table.rank + 1)
    if axis == 0 and table.axes:
        node.target, node.args = _aten.alias.default, (node.args[0],)
        return _Gained(table.rank + 1, 0)
    node.update_arg(1, max(axis + table.axes, 1))
    return _Gained(table.rank + 1, table.axes)


def _is_pointwise(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target.overloadpacket in _UNTAGGED
    )


def _spread(table: Node, before: Node, missing: int) -> Node:
    """The table with so many sizes of 1 behind the batch's."""
    if missing < 0:
        raise UnsupportedModelError(f"distances of tokens meet the batch in '{before}', where it has no place")
    for _ in range(missing):
        with before.graph.inserting_before(before):
            made = before.graph.call_function(_aten.unsqueeze.default, (table, 1))
        made.meta = dict(table.meta)
        table = made
    return table
