"""Let ONNX Runtime's attention kernel rotate queries and keys itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import POSITIONS
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import constant, made_by

from ._rows import size
from .kernels import ORT_DOMAIN

_POINTWISE = {"Cast", "Mul", "Cos", "Sin"}
"""What the angle of one position may be computed with, after positions have got an axis for the frequencies."""


@register
@dataclass(frozen=True, slots=True)
class OrtRotary(Pass):
    """Fuse the `RotaryEmbedding` of queries and of keys into the `GroupQueryAttention` that takes them.

    The kernel looks up cosines and sines by position, in tables with a row for each slot of the cache. They are
    computed from the slots' numbers just as the model computes them from ``position_ids``; the runtime does so once,
    when it loads the model, and no longer in each run.

    Fused is what turns both queries and keys by whole heads, with cosines and sines that depend on nothing but a
    token's own position.
    """

    name: ClassVar[str] = "ort-rotary"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "attention-lowered"})
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Fuse what can be; report why the rest cannot."""
        if not module.states:
            return
        positions = module.port(POSITIONS)
        shared: dict[object, ir.Value] = {}
        for node in self.sites(module):
            problem = _problem(node, positions)
            if problem is not None:
                rewriter.missed(node, problem)
            elif rewriter.rewrite("RotaryEmbedding"):
                _fuse(node, positions, shared, rewriter)
        rewriter.sweep()

    def sites(self, module: Module) -> list[ir.Node]:
        """Kernels whose queries or keys come out of a rotation."""
        kernels = [n for n in module.graph if (n.domain, n.op_type) == (ORT_DOMAIN, "GroupQueryAttention")]
        return [n for n in kernels if any(made_by(v, "RotaryEmbedding") is not None for v in n.inputs[:2])]


def _problem(node: ir.Node, positions: ir.Value) -> str | None:
    """Why a kernel cannot rotate by itself, or `None` when it can."""
    rotations = [made_by(value, "RotaryEmbedding") for value in node.inputs[:2]]
    queries, keys = rotations
    if queries is None or keys is None:
        return "only queries or only keys are rotated"
    if queries.inputs[1:] != keys.inputs[1:]:
        return "queries and keys are rotated by different angles"
    if _interleaved(queries) != _interleaved(keys):
        return "queries and keys are rotated in different orders"
    width, half = size(node.inputs[3], 3), size(queries.inputs[1], 2)
    if width is None or half is None or width != 2 * half:
        return "only a part of each head is rotated"
    if width % 16:
        return "the width of a head is no multiple of sixteen"
    if not all(_depends_on_position(value, positions) for value in queries.inputs[1:]):
        return "cosines and sines depend on more than the position of a token"
    return None


def _interleaved(rotation: ir.Node) -> int:
    return rotation.attributes.get_int("interleaved", 0)


def _depends_on_position(value: ir.Value | None, positions: ir.Value) -> bool:
    """Whether ``[batch, seq, half]`` is computed from each token's position, the weights, and nothing else."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or value is None:
        return False
    if node.op_type == "Unsqueeze":
        return node.inputs[0] is positions and constant(node.inputs[1]) in ([-1], [2])
    if node.op_type not in _POINTWISE or not _depends_on_position(node.inputs[0], positions):
        return False
    # A row of frequencies, or one number for all, is the same for every token.
    return all(_is_row(factor) for factor in node.inputs[1:])


def _is_row(value: ir.Value | None) -> bool:
    if value is None or not value.is_initializer() or value.shape is None or not value.shape.is_static():
        return False
    return all(dim == 1 for dim in value.shape.dims[:-1]) and len(value.shape) <= 3


def _fuse(node: ir.Node, positions: ir.Value, shared: dict[object, ir.Value], rewriter: Rewriter) -> None:
    """Fuse the rotations of a kernel without a `_problem`; `shared` holds what several layers share."""
    queries, keys = (made_by(value, "RotaryEmbedding") for value in node.inputs[:2])
    past = node.inputs[3]
    assert queries is not None and keys is not None and past is not None and past.shape is not None
    slots = past.shape[2]
    first = rewriter.at(next(iter(rewriter.graph)))
    if "positions" not in shared:  # padding has position -1; what the kernel makes of its row is not kept
        shared["positions"] = first("Max", positions, first.const(0))
    if slots not in shared:
        count = first("Squeeze", first("Shape", past, start=2, end=3))
        shared[slots] = first("Unsqueeze", first("Range", first.const(0), count, first.const(1)), first.const([0]))
    tables = [_table(value, positions, slots, shared, rewriter.at(queries)) for value in queries.inputs[1:]]
    for index, value in enumerate((*tables, shared["positions"]), start=7):
        node.replace_input_with(index, value)
    for index, rotation in enumerate((queries, keys)):
        node.replace_input_with(index, rotation.inputs[0])
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", _interleaved(queries))


def _table(
    value: ir.Value | None, positions: ir.Value, slots: object, shared: dict[object, ir.Value], b: OpBuilder
) -> ir.Value:
    """``[slots, half]`` for ``[batch, seq, half]``: the same steps from the numbers of the slots, as one row."""
    if (value, slots) not in shared:
        shared[value, slots] = b("Squeeze", _again(value, positions, shared[slots], b), b.const([0]))
    return shared[value, slots]


def _again(value: ir.Value | None, positions: ir.Value, numbers: ir.Value, b: OpBuilder) -> ir.Value:
    if value is positions:
        return numbers
    node = value.producer() if value is not None else None
    assert node is not None
    attributes = {a.name: a.value for a in node.attributes.values()}
    return b(node.op_type, _again(node.inputs[0], positions, numbers, b), *node.inputs[1:], **attributes)
