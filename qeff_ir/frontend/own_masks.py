"""Refuse models that mask attention by themselves: such a mask would not know where padding and earlier chunks are."""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.module import SOURCE_KEY


_PLACED = ("CachePositions", "StateWindow", "LinearAttention")
"""Ops that look at the positions in a state."""


def refuse_own_masks(graph: ir.Graph, name: str) -> None:
    """Check that the only masks of a lowered graph are those made from the positions in the cache.

    Args:
        graph: As lowered; masks that were captured read `CachePositions`.
        name: The model's class, for the message.

    Raises:
        UnsupportedModelError: No mask was captured, or a stored one is cut to the length of this run.
    """
    if any(node.op_type == "EveryToken" and node.outputs[0].uses() for node in graph):
        raise UnsupportedModelError(
            f"{name} is not causal: its attention sees later tokens, as an encoder's does, so it cannot generate token "
            "by token; if it is meant to be a decoder, set is_decoder in its configuration"
        )
    captured = any(node.op_type in _PLACED for node in graph)
    stored = next((node for node in graph if _cuts_stored_mask(node)), None)
    if captured and stored is None:
        return
    where = f" in {stored.metadata_props.get(SOURCE_KEY) or 'the model itself'}" if stored is not None else ""
    raise UnsupportedModelError(
        f"{name} builds attention masks by itself{where}, so it cannot be told where padding and earlier chunks are"
    )


def _cuts_stored_mask(node: ir.Node) -> bool:
    """Whether a node slices a stored boolean table at computed bounds."""
    if node.op_type != "Slice" or len(node.inputs) < 3:
        return False
    table, *bounds = node.inputs[:3]
    if table is None or not table.is_initializer() or table.dtype != ir.DataType.BOOL or len(table.shape or ()) < 2:
        return False
    return any(bound is not None and bound.const_value is None for bound in bounds)
