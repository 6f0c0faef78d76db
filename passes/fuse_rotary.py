"""Raise decomposed rotary position embeddings to the standard `RotaryEmbedding`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import OpBuilder, Pass, Rewriter, register
from qeff_ir.passing.matching import constant, made_by, scalar, slice_bounds

from ._rotary_of_tokens import fuse as fuse_tokens

_UNARY = {"Cos", "Sin", "Cast"}


@register
@dataclass(frozen=True, slots=True)
class FuseRotary(Pass):
    """Fuse ``x * cos + rotate_half(x) * sin`` into `RotaryEmbedding`.

    Both halves of ``cos`` and ``sin`` are equal by construction (they are computed from frequencies concatenated with
    themselves); the fused op takes one half, computed once for all layers. Encoders rotate ``[tokens, heads, width]``,
    which is fused behind the transposition that follows. A rotation that is not of this form stays decomposed.
    """

    name: ClassVar[str] = "fuse-rotary"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Rewrite every rotation; ``Concat(-x2, x1)`` marks the sites."""
        halves: dict[ir.Value, ir.Value] = {}
        for node in self.sites(module):
            problem = _fuse(node, halves, rewriter)
            if problem is not None:
                rewriter.missed(node, problem)
        rewriter.sweep()

    def sites(self, module: Module) -> list[ir.Node]:
        """Halves swapped, one of them negated."""
        return [
            node
            for node in module.graph
            if node.op_type == "Concat" and len(node.inputs) == 2 and made_by(node.inputs[0], "Neg") is not None
        ]


def _fuse(rotated: ir.Node, halves: dict[ir.Value, ir.Value], rewriter: Rewriter) -> str | None:
    """Rewrite the rotation around ``rotated = Concat(-x2, x1)``; returns why not, or `None` when done."""
    negation = made_by(rotated.inputs[0], "Neg")
    x = _split_in_halves(negation.inputs[0] if negation else None, rotated.inputs[1])
    if x is None:
        return "the rotated value is not made of the two halves of one value"
    consumers = list(rotated.outputs[0].consumers())
    if len(consumers) != 1 or consumers[0].op_type != "Mul":
        return "the rotated value is not multiplied by one sine"
    times_sin = consumers[0]
    sums = [c for c in times_sin.outputs[0].consumers() if c.op_type == "Add"]
    if len(sums) != 1:
        return "the rotated part is not added to the plain part"
    total = sums[0]
    times_cos = made_by(next(v for v in total.inputs if v is not times_sin.outputs[0]), "Mul")
    if times_cos is None or x not in times_cos.inputs:
        return "the plain part is not the value times a cosine"
    sine = next(v for v in times_sin.inputs if v is not rotated.outputs[0])
    cosine = next(v for v in times_cos.inputs if v is not x)
    if x.shape is not None and len(x.shape) == 3:
        return fuse_tokens(total, x, (cosine, sine), halves, rewriter)
    sin, cos = (_half(value, halves, rewriter) for value in (sine, cosine))
    if sin is None or cos is None:
        return "the two halves of cosine and sine are not known to be equal"
    b = rewriter.at(total)
    cos, sin = (_for_every_row(v, x, halves, b) for v in (cos, sin))
    rewriter.replace(total, b("RotaryEmbedding", x, cos, sin), "RotaryEmbedding")
    return None


def _for_every_row(half: ir.Value, x: ir.Value, halves: dict[ir.Value, ir.Value], b: OpBuilder) -> ir.Value:
    """The half with the batch of `x`, where all rows share their positions; the operator does not broadcast."""
    assert x.shape is not None
    if half.shape is None or half.shape[0] != 1 or x.shape[0] == 1:
        return half
    if half not in halves:
        rows = b("Concat", b("Shape", x, start=0, end=1), b.const([1, 1]), axis=0)
        halves[half] = b("Expand", half, rows, shape=ir.Shape([*x.shape.dims[:1], *half.shape.dims[1:]]))
    return halves[half]


def _split_in_halves(second: ir.Value | None, first: ir.Value | None) -> ir.Value | None:
    """The value ``[B, H, S, D]`` or ``[S, H, D]`` whose halves along the last axis are given, if there is one."""
    axis = len(first.shape) - 1 if first is not None and first.shape is not None else -1
    lower, upper = slice_bounds(first, axis), slice_bounds(second, axis)
    if axis not in (2, 3) or lower is None or upper is None or lower[0] is not upper[0]:
        return None
    x, start, end = lower
    if x.shape is None or not isinstance(width := x.shape[axis], int):
        return None
    half = width // 2
    return x if (start, end) == (0, half) and upper[1] == half and upper[2] >= width else None


def _half(value: ir.Value | None, halves: dict[ir.Value, ir.Value], rewriter: Rewriter) -> ir.Value | None:
    """One half ``[B, S, D/2]`` of a cosine or sine ``[B, 1, S, D]``, rebuilt on the unrepeated frequencies."""
    unsqueeze = made_by(value, "Unsqueeze")
    if unsqueeze is None or constant(unsqueeze.inputs[1]) != [1]:
        return None
    full = unsqueeze.inputs[0]
    assert full is not None
    if full not in halves:
        # Walk up to the concatenation, then repeat the elementwise steps on its single part.
        steps: list[ir.Node] = []
        at = full
        while (concat := made_by(at, "Concat")) is None:
            node = at.producer()
            if node is None:
                return None
            if node.op_type in _UNARY or (node.op_type == "Mul" and scalar(node.inputs[1]) is not None):
                data = node.inputs[0]
            else:
                return None
            assert data is not None
            steps.append(node)
            at = data
        if len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1] or concat.inputs[0] is None:
            return None
        part = concat.inputs[0]
        for node in reversed(steps):
            attributes = {a.name: a.value for a in node.attributes.values()}
            part = rewriter.at(node)(node.op_type, part, *node.inputs[1:], **attributes)
        if part.shape is None and full.shape is not None and isinstance(width := full.shape[-1], int):
            part.shape, part.type = ir.Shape([*full.shape.dims[:-1], width // 2]), full.type
        halves[full] = part
    return halves[full]
