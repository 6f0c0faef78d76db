"""Attention whose softmax goes over the keys block by block, and never holds the scores of all of them.

M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qeff_ir.passing.scores import HIDDEN_SCORE, Scores


def attend(
    parts: Scores, keys: Sequence[ir.Value], values: Sequence[ir.Value], masks: Sequence[ir.Value | None]
) -> ir.Value:
    """Attention over blocks of keys, ``[batch, heads, seq, value_dim]``.

    Of the blocks so far, three values are kept: the highest score of each query, the sum of the weights, and the
    values by their weights, both as if that score were the highest of all. A higher one in a later block makes them
    fade.

    Args:
        parts: Of the attention; what it reads as keys, values and mask is not looked at.
        keys: The blocks, ``[batch, kv_heads, keys, head_dim]``, in any order.
        values: Of the same blocks.
        masks: Of the same blocks; `None` where every query sees all of them.
    """
    b, queries = parts.b, parts.queries()
    top = total = mixed = None
    for key, value, mask in zip(keys, values, masks, strict=True):
        scores = parts.of_keys(queries, key, mask)
        highest = b("ReduceMax", scores, b.const([-1]), keepdims=1)
        if mask is not None and mask.dtype is not ir.DataType.BOOL:  # a bias may be -inf for a whole block
            highest = b("Max", highest, b.const(HIDDEN_SCORE, np.float32))
        new = highest if top is None else b("Max", top, highest)
        weights = b("Exp", b("Sub", scores, new))
        of_block, sums = parts.mixed(weights, value), b("ReduceSum", weights, b.const([-1]), keepdims=1)
        if top is not None:
            fade = b("Exp", b("Sub", top, new))
            of_block, sums = b("Add", b("Mul", mixed, fade), of_block), b("Add", b("Mul", total, fade), sums)
        top, total, mixed = new, sums, of_block
    assert mixed is not None and total is not None
    sinks = parts.sinks()
    if sinks is not None:  # one more logit, which takes weight and gives nothing
        new = b("Max", top, sinks)
        fade = b("Exp", b("Sub", top, new))
        total = b("Add", b("Mul", total, fade), b("Exp", b("Sub", sinks, new)))
        mixed = b("Mul", mixed, fade)
    return parts.joined(b("Div", mixed, total))
