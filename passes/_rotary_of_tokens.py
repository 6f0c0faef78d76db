"""Rotations of ``[tokens, heads, width]``: encoders turn queries and keys before they put the heads first."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.matching import constant, made_by

_KEEPING_COLUMNS = {"Cos", "Sin", "Cast"}
"""What computes each number of a row from the one in its place."""


def fuse(
    total: ir.Node,
    x: ir.Value,
    angles: tuple[ir.Value | None, ir.Value | None],
    halves: dict[ir.Value, ir.Value],
    rewriter: Rewriter,
) -> str | None:
    """Rotate behind the transposition that puts the heads first, in the standard form ``[1, heads, tokens, width]``.

    Args:
        total: What adds the rotated part to the plain one.
        x: What is rotated, ``[tokens, heads, width]``.
        angles: Cosine and sine, ``[tokens, 1, width]``.
        halves: Halves of those that are made already, ``[1, tokens, width / 2]``.
        rewriter: Of the module.

    Returns:
        Why not, or `None` when done.
    """
    batches = _batches(total.outputs[0])
    if batches is None:
        return "what is rotated, [tokens, heads, width], does not become one batch with the heads first"
    found = [_half(angle, halves, rewriter) for angle in angles]
    if found[0] is None or found[1] is None:
        return "the two halves of cosine and sine are not known to be equal"
    assert x.shape is not None
    tokens, heads, width = x.shape.dims
    b = rewriter.at(total)
    turned = b("Transpose", x, perm=[1, 0, 2], shape=ir.Shape([heads, tokens, width]))
    batch = b("Unsqueeze", turned, b.const([0]), shape=ir.Shape([1, heads, tokens, width]))
    made = b("RotaryEmbedding", batch, *found)
    if rewriter.rewrite("RotaryEmbedding"):
        for node in batches:
            rewriter.substitute(node, made)
    return None


def _batches(value: ir.Value) -> list[ir.Node] | None:
    """The nodes that make ``[1, heads, tokens, width]`` of a value, if that is all that becomes of it."""
    turned = list(value.consumers())
    if value.is_graph_output() or not turned or any(not _puts_heads_first(node) for node in turned):
        return None
    batches = [node for one in turned for node in one.outputs[0].consumers()]
    single = all(node.op_type == "Unsqueeze" and constant(node.inputs[1]) in ([0], [-4]) for node in batches)
    return batches if batches and single and not any(one.outputs[0].is_graph_output() for one in turned) else None


def _puts_heads_first(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == [1, 0, 2]


def _half(value: ir.Value | None, halves: dict[ir.Value, ir.Value], rewriter: Rewriter) -> ir.Value | None:
    """One half of a cosine or sine ``[tokens, 1, width]``, as ``[1, tokens, width / 2]``."""
    if value is not None and value.const_value is not None and WEIGHT_KEY not in value.metadata_props:
        return (
            halves[value] if value in halves else _half_of_numbers(value, value.const_value.numpy(), halves, rewriter)
        )
    unsqueeze = made_by(value, "Unsqueeze")
    full = None if unsqueeze is None or constant(unsqueeze.inputs[1]) not in ([1], [-2]) else unsqueeze.inputs[0]
    if unsqueeze is None or full is None or full.shape is None or not _halves_are_equal(full):
        return None
    if full not in halves:
        tokens, width = full.shape.dims
        assert isinstance(width, int)
        b: OpBuilder = rewriter.at(unsqueeze)
        half = b("Slice", full, b.const([0]), b.const([width // 2]), b.const([1]), shape=ir.Shape([tokens, width // 2]))
        halves[full] = b("Unsqueeze", half, b.const([0]), shape=ir.Shape([1, tokens, width // 2]))
    return halves[full]


def _half_of_numbers(
    value: ir.Value, table: Array, halves: dict[ir.Value, ir.Value], rewriter: Rewriter
) -> ir.Value | None:
    """The same of a constant, as those of small pictures are."""
    if table.ndim != 3 or table.shape[1] != 1:
        return None
    left, right = np.split(table[:, 0], 2, axis=-1)
    if not np.array_equal(left, right):
        return None
    halves[value] = rewriter.constant(left[np.newaxis])
    return halves[value]


def _halves_are_equal(value: ir.Value | None) -> bool:
    """Whether each row of a value is made of two equal halves: of a concatenation with itself, whose rows may move."""
    while value is not None and value.shape is not None and isinstance(width := value.shape[-1], int):
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "Concat":
            axis, first = node.attributes.get_int("axis", 0), node.inputs[0]
            return axis in (-1, len(value.shape) - 1) and len(node.inputs) == 2 and first is node.inputs[1]
        data = node.inputs[0]
        if data is None or data.shape is None or data.shape[-1] != width:
            return False
        if not (node.op_type in _KEEPING_COLUMNS or _moves_rows(node, len(data.shape))):
            return False
        value = data
    return False


def _moves_rows(node: ir.Node, rank: int) -> bool:
    """Whether a node only puts rows elsewhere, all along the last axis; the width is the same before and after."""
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) % rank < rank - 1
    if node.op_type == "GatherND":
        indices = node.inputs[1]
        depth = indices.shape[-1] if indices is not None and indices.shape is not None else None
        batched = node.attributes.get_int("batch_dims", 0)
        return isinstance(depth, int) and depth + batched < rank
    return node.op_type == "Reshape"
