"""What all forms of captured attention have in common: grouped queries, masked scores, sinks, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.passing.matching import operand
from qeff_ir.passing.rewriter import OpBuilder

HIDDEN_SCORE = -65504.0
"""Score of a key that a query may not see: the least finite half-precision number. It vanishes in the softmax at any
precision, and a row that sees nothing gives finite numbers instead of NaN, which would spread through the cache."""


def does_more(node: ir.Node) -> bool:
    """Whether the standard op hides later tokens by counting those it is given, or joins a cache to them by itself."""
    if node.domain != "":
        return False
    return bool(node.attributes.get_int("is_causal", 0)) or any(value is not None for value in node.inputs[4:])


@dataclass(frozen=True)
class Scores:
    """Writes the parts of one `Attention` or `SinkAttention`, the query heads of a group in an axis of their own.

    Scale, soft-cap, masks of any kind, sinks, and values narrower than keys are all kept.

    Attributes:
        node: The attention.
        b: Where its parts are written.
        heads: Query heads.
        kv_heads: Key/value heads.
        width: Of a query and a key.
        value_width: Of a value.
    """

    node: ir.Node
    b: OpBuilder
    heads: int
    kv_heads: int
    width: int
    value_width: int

    @classmethod
    def of(cls, node: ir.Node, b: OpBuilder) -> Scores:
        """The parts of an attention.

        Raises:
            PassError: The number of heads is not known, or attention counts tokens by itself.
        """
        name = node.outputs[0].name
        if does_more(node):
            raise PassError(f"attention '{name}' counts tokens or keeps a cache by itself: give it a mask and states")
        q, k, v = (value.shape if value is not None else None for value in node.inputs[:3])
        if q is not None and k is not None and v is not None and len(q) == len(v) == 4:
            sizes = [size for size in (q[1], k[1], q[3], v[3]) if isinstance(size, int)]
            if len(sizes) == 4:
                return cls(node, b, *sizes)
        raise PassError(f"attention '{name}' has heads of unknown number or width; keep shapes in the pass before")

    @property
    def keys(self) -> ir.Value:
        """``[batch, kv_heads, ctx, head_dim]``."""
        return self._given(1)

    @property
    def values(self) -> ir.Value:
        """``[batch, kv_heads, ctx, value_dim]``."""
        return self._given(2)

    @property
    def mask(self) -> ir.Value | None:
        """Booleans (true where a query sees a key) or a bias, broadcast to ``[batch, heads, seq, ctx]``."""
        return operand(self.node, 3)

    def _given(self, index: int) -> ir.Value:
        value = self.node.inputs[index]
        assert value is not None
        return value

    def queries(self) -> ir.Value:
        """Scaled queries, ``[batch, kv_heads, group, seq, head_dim]``.

        Scaling them costs less than scaling the scores, and keeps the scores in half range.
        """
        b, group = self.b, self.heads // self.kv_heads
        scale = self.node.attributes.get_float("scale", self.width**-0.5)
        scaled = b("Mul", self._given(0), b.const(scale, np.float32))
        return b("Reshape", scaled, b.const([0, self.kv_heads, group, -1, self.width]))

    def of_keys(self, queries: ir.Value, keys: ir.Value, mask: ir.Value | None) -> ir.Value:
        """Scores ``[batch, kv_heads, group, seq, ctx]`` of some keys, capped, and hidden or biased by their mask."""
        b, cap = self.b, self.node.attributes.get_float("softcap", 0.0)
        turned = b("Unsqueeze", b("Transpose", keys, perm=[0, 1, 3, 2]), b.const([2]))
        scores = b("MatMul", queries, turned)
        if cap > 0.0:
            scores = b("Mul", b("Tanh", b("Div", scores, b.const(cap, np.float32))), b.const(cap, np.float32))
        return scores if mask is None else self._masked(scores, mask)

    def _masked(self, scores: ir.Value, mask: ir.Value) -> ir.Value:
        b, heads, kv_heads, dtype = self.b, self.heads, self.kv_heads, mask.dtype
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

    def sinks(self) -> ir.Value | None:
        """One more logit for each head, ``[1, kv_heads, group, 1, 1]``; `None` without sinks."""
        sinks, b = operand(self.node, 4) if self.node.op_type == "SinkAttention" else None, self.b
        if sinks is None:
            return None
        return b("Reshape", sinks, b.const([1, self.kv_heads, self.heads // self.kv_heads, 1, 1]))

    def mixed(self, weights: ir.Value, values: ir.Value) -> ir.Value:
        """Values by their weights, ``[batch, kv_heads, group, seq, value_dim]``."""
        return self.b("MatMul", weights, self.b("Unsqueeze", values, self.b.const([2])))

    def joined(self, mixed: ir.Value) -> ir.Value:
        """The result of the attention, ``[batch, heads, seq, value_dim]``."""
        return self.b("Reshape", mixed, self.b.const([0, self.heads, -1, self.value_width]))
