"""Lower attention to the form that a target runs best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect
from qeff_ir.passing.matching import operand

HIDDEN_SCORE = -65504.0
"""Score of a key that a query may not see: the least finite half-precision number. It vanishes in the softmax at any
precision, and a row that sees nothing gives finite numbers instead of NaN, which would spread through the cache."""


@register
@dataclass(frozen=True, slots=True)
class Attention(Pass):
    """Lower captured attention.

    ``impl=grouped`` writes it as matrix products and a softmax, with the query heads of a group in an axis of their
    own, so that keys and values are never copied per query head. ``impl=standard`` keeps the standard `Attention` op
    and lowers only what it cannot express (attention sinks).

    Scale, soft-cap, windows (in the mask), sinks, and values narrower than keys are all kept.
    """

    name: ClassVar[str] = "attention"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"attention-lowered"})
    expect: ClassVar[Expect] = AllSites()
    idempotent: ClassVar[bool] = True

    impl: Literal["grouped", "standard"] = field(default="grouped", metadata={"help": "form of the result"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Lower every attention node.

        Raises:
            PassError: The number of heads is not known, or attention counts tokens by itself.
        """
        for node in self.sites(module):
            rule = "sinks" if node.op_type == "SinkAttention" else "grouped"
            rewriter.replace(node, _grouped(node, rewriter.at(node)), rule)
        rewriter.sweep()
        operators.attach(module.model)

    def sites(self, module: Module) -> list[ir.Node]:
        """Attention with sinks; with ``impl=grouped`` the standard op too."""
        lowered = {(dialect.DOMAIN, "SinkAttention"), *([("", "Attention")] if self.impl == "grouped" else ())}
        return [node for node in module.graph if (node.domain, node.op_type) in lowered]


def does_more(node: ir.Node) -> bool:
    """Whether the standard op hides later tokens by counting those it is given, or joins a cache to them by itself."""
    if node.domain != "":
        return False
    return bool(node.attributes.get_int("is_causal", 0)) or any(value is not None for value in node.inputs[4:])


def _grouped(node: ir.Node, b: OpBuilder) -> ir.Value:
    """Attention over ``[batch, kv_heads, group, seq, head_dim]``; returns ``[batch, heads, seq, value_dim]``."""
    if does_more(node):
        raise PassError(
            f"attention '{node.outputs[0].name}' counts tokens or keeps a cache by itself: give it a mask and states"
        )
    q, k, v = node.inputs[:3]
    mask, sinks = operand(node, 3), operand(node, 4) if node.op_type == "SinkAttention" else None
    assert q is not None and k is not None and v is not None
    heads, kv_heads, width, value_width = _sizes(node, q, k, v)
    scale = node.attributes.get_float("scale", width**-0.5)
    cap = node.attributes.get_float("softcap", 0.0)

    # Scaling the queries costs less than scaling the scores, and keeps the scores in half range.
    scaled = b("Mul", q, b.const(scale, np.float32))
    grouped = b("Reshape", scaled, b.const([0, kv_heads, heads // kv_heads, -1, width]))
    keys = b("Unsqueeze", b("Transpose", k, perm=[0, 1, 3, 2]), b.const([2]))
    scores = b("MatMul", grouped, keys)
    if cap > 0.0:
        scores = b("Mul", b("Tanh", b("Div", scores, b.const(cap, np.float32))), b.const(cap, np.float32))
    if mask is not None:
        scores = _masked(scores, mask, heads, kv_heads, b)
    if sinks is not None:
        weights = _softmax_with_sinks(scores, sinks, heads, kv_heads, b)
    else:
        weights = b("Softmax", scores, axis=-1)
    mixed = b("MatMul", weights, b("Unsqueeze", v, b.const([2])))
    return b("Reshape", mixed, b.const([0, heads, -1, value_width]))


def _masked(scores: ir.Value, mask: ir.Value, heads: int, kv_heads: int, b: OpBuilder) -> ir.Value:
    """Scores without those of hidden keys (a mask of booleans), or with a bias for each (one of floats)."""
    dtype = mask.dtype
    if mask.shape is not None and len(mask.shape) < 4:  # the same for all rows, or for all heads too
        more = 4 - len(mask.shape)
        mask = b("Unsqueeze", mask, b.const(list(range(more))), shape=ir.Shape([*[1] * more, *mask.shape.dims]))
    if mask.shape is not None and mask.shape[1] == heads > 1:  # one for each query head
        sizes = b("Concat", b.const([0, kv_heads, heads // kv_heads]), b("Shape", mask, start=2, end=4), axis=0)
        mask = b("Reshape", mask, sizes)
    else:
        mask = b("Unsqueeze", mask, b.const([1]))
    if dtype is not ir.DataType.BOOL:
        return b("Add", scores, mask)
    return b("Where", mask, scores, b.const(HIDDEN_SCORE, np.float32))


def _softmax_with_sinks(scores: ir.Value, sinks: ir.Value, heads: int, kv_heads: int, b: OpBuilder) -> ir.Value:
    """A softmax in which each head has one more logit, whose weight is dropped."""
    rows = b("Slice", scores, b.const([0]), b.const([1]), b.const([4]))
    logit = b("Reshape", sinks, b.const([1, kv_heads, heads // kv_heads, 1, 1]))
    column = b("Add", b("Mul", rows, b.const(0.0, np.float32)), logit)
    weights = b("Softmax", b("Concat", scores, column, axis=-1), axis=-1)
    return b("Slice", weights, b.const([0]), b.const([-1]), b.const([4]))


def _sizes(node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value) -> tuple[int, int, int, int]:
    """``(heads, kv_heads, head_dim, value_dim)``."""
    if q.shape is not None and k.shape is not None and v.shape is not None and len(q.shape) == len(v.shape) == 4:
        sizes = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
        if all(isinstance(s, int) for s in sizes):
            return sizes  # pyright: ignore[reportReturnType]
    raise PassError(
        f"attention '{node.outputs[0].name}' has heads of unknown number or width; keep shapes in the pass before"
    )
