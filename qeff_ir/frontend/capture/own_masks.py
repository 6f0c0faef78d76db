"""Refuse models that mask attention by themselves: such a mask would not know where padding and earlier chunks are."""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.export.given import TYPES
from qeff_ir.ir.module import SOURCE_KEY

_BY_POSITION = ("position_ids", TYPES)
"""Inputs that may be looked up by slot: positions say where a token is, not what it is, and the kinds of tokens are of
runs that hold whole pictures."""

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
    kept = next((node for node in graph if _looks_up_tokens_by_slot(node)), None)
    if kept is not None:
        raise UnsupportedModelError(
            f"{name} makes a mask in {kept.metadata_props.get(SOURCE_KEY) or 'the model itself'} from what each token "
            "of the prompt is, which no cache keeps beyond a run"
        )
    stored = next((node for node in graph if _cuts_stored_mask(node)), None)
    if captured and stored is None:
        return
    where = f" in {stored.metadata_props.get(SOURCE_KEY) or 'the model itself'}" if stored is not None else ""
    raise UnsupportedModelError(
        f"{name} builds attention masks by itself{where}, so it cannot be told where padding and earlier chunks are"
    )


def _looks_up_tokens_by_slot(node: ir.Node) -> bool:
    """Whether a node indexes something of this run's length by the positions in a cache."""
    if node.op_type not in ("GatherND", "Gather", "GatherElements"):
        return False
    data, index = node.inputs[:2]
    if data is None or index is None or data.dtype == ir.DataType.FLOAT:
        return False
    made = _makers(data)
    return "CachePositions" in _makers(index) and "input" in made and made.isdisjoint({"CachePositions", "CacheUpdate"})


def _makers(value: ir.Value) -> set[str]:
    """Ops that a value is made with, by arithmetic on whole numbers and truths alone; "input" for a graph input."""
    todo, seen, made = [value], {value}, set[str]()
    while todo:
        current = todo.pop()
        node = current.producer()
        if node is None:
            made.update({"input"} if current.is_graph_input() and current.name not in _BY_POSITION else ())
            continue
        made.add(node.op_type)
        new = [v for v in node.inputs if v is not None and v not in seen and v.dtype != ir.DataType.FLOAT]
        seen.update(new)
        todo.extend(new)
    return made


def _cuts_stored_mask(node: ir.Node) -> bool:
    """Whether a node slices a stored boolean table at computed bounds."""
    if node.op_type != "Slice" or len(node.inputs) < 3:
        return False
    table, *bounds = node.inputs[:3]
    if table is None or not table.is_initializer() or table.dtype != ir.DataType.BOOL or len(table.shape or ()) < 2:
        return False
    return any(bound is not None and bound.const_value is None for bound in bounds)
