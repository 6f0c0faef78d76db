"""Values of attention as rows of one token each, ``[batch, seq, heads * width]``: the form that projections make."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qeff_ir.passing.base import OpBuilder
from qeff_ir.passing.matching import made_by

SWAP = [0, 2, 1, 3]
"""From ``[batch, seq, heads, width]`` to ``[batch, heads, seq, width]``, and back."""


def size(value: ir.Value | None, axis: int) -> int | None:
    """Size of one axis, when it is known."""
    if value is None or value.shape is None or axis >= len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def rows(value: ir.Value | None, heads: int, width: int, b: OpBuilder) -> ir.Value:
    """The rows of ``[batch, heads, seq, width]``, found before its transposition where there is one.

    A rotation on the way is done on the rows.
    """
    assert value is not None
    rotary = made_by(value, "RotaryEmbedding")
    if rotary is not None:
        attributes: dict[str, Any] = {a.name: a.value for a in rotary.attributes.values()} | {"num_heads": heads}
        plain = rows(rotary.inputs[0], heads, width, b)
        return b("RotaryEmbedding", plain, *rotary.inputs[1:], **attributes)
    swap = made_by(value, "Transpose")
    if swap is not None and list(swap.attributes["perm"].as_ints()) == SWAP:
        split = swap.inputs[0]
    else:
        split = b("Transpose", value, perm=SWAP)
    merge = made_by(split, "Reshape")
    if merge is not None and merge.inputs[0] is not None:
        flat = merge.inputs[0]
        if flat.shape is not None and len(flat.shape) == 3 and size(flat, 2) == heads * width:
            return flat
    return b("Reshape", split, b.const([0, 0, heads * width]))


def flattening(node: ir.Node, features: int) -> ir.Node | None:
    """The reshape that turns a node's ``[batch, heads, seq, width]`` into rows, when nothing else reads it."""
    swaps = list(node.outputs[0].consumers())
    if len(swaps) != 1 or swaps[0].op_type != "Transpose" or list(swaps[0].attributes["perm"].as_ints()) != SWAP:
        return None
    merges = list(swaps[0].outputs[0].consumers())
    out = merges[0].outputs[0] if len(merges) == 1 and merges[0].op_type == "Reshape" else None
    if out is None or out.shape is None or len(out.shape) != 3 or size(out, 2) != features:
        return None
    return merges[0]
