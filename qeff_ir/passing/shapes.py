"""Keep the shapes of masks true when the slot positions that they are made of change theirs."""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.ir.residents import DimValue


def carry_on(graph: ir.Graph, positions: ir.Value, old: DimValue, new: DimValue) -> None:
    """Correct the shapes of all that is computed from slot positions, up to the attention that reads the masks.

    A runtime plans its memory by these shapes: two values that claim one size get one buffer.

    Args:
        graph: The main graph.
        positions: ``[1 or batch, length]``, its shape already right.
        old: Symbol of the context axis in the shapes to correct; a value without it ends the way.
        new: Its symbol from now on.
    """
    moved = {positions}
    for node in graph:
        if moved.isdisjoint(node.inputs):
            continue
        for out in node.outputs:
            dims = list(out.shape.dims) if out.shape is not None else []
            if old not in dims:
                continue
            dims = [new if d == old else d for d in dims]
            if _is_one_row(node, len(dims)):
                dims[0] = 1
            out.shape = ir.Shape(dims)
            moved.add(out)


_BROADCASTING = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul"}
    | {"Not", "Or", "Pow", "Sub", "Sum", "Where"}
)
"""Operators that align the axes of their inputs at the last."""


def _is_one_row(node: ir.Node, rank: int) -> bool:
    """Whether no input of a node that keeps the first axis or puts axes behind it has a batch."""
    shapes = [v.shape for v in node.inputs if v is not None and v.shape is not None]
    if node.op_type in _BROADCASTING:  # the first of fewer axes is another than the first of the result
        shapes = [s for s in shapes if len(s) == rank]
    return all(len(s) <= 1 or s[0] == 1 for s in shapes if len(s) <= rank)
