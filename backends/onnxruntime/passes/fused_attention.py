"""Hand causal attention over a retained cache to ONNX Runtime's one kernel for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import POSITIONS
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import constant, made_by, operand
from qeff_ir.passing.scores import does_more

from ._rows import SWAP, flattening, rows, size
from .kernels import ORT_DOMAIN

_INT32 = ir.DataType.INT32


@register
@dataclass(frozen=True, slots=True)
class OrtAttention(Pass):
    """Fuse two `TensorScatter` and the causal `Attention` over them into one `GroupQueryAttention`.

    The kernel writes the caches in place as before, without the padding, but reads only the slots up to a row's last
    token instead of all of them, and takes queries, keys and values as the projections make them,
    ``[batch, seq, heads * width]``.

    Fused is what is plainly causal: a mask ``slot <= position_ids`` over caches that keep every token. A windowed,
    chunked or otherwise masked attention stays the standard op, which is right for any mask.
    """

    name: ClassVar[str] = "ort-attention"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "attention-lowered"})
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Fuse what can be; report why the rest cannot."""
        if not module.states:
            return
        lengths: dict[object, list[ir.Value]] = {}
        position_ids = module.port(POSITIONS)
        problems = {node: _problem(node, position_ids) for node in self.sites(module)}
        real = None
        if 2 * list(problems.values()).count(None) < len(module.states):
            # Other layers have states: what they store of padding is hidden from tokens, but NaN would show through.
            b = rewriter.at(next(iter(module.graph)))
            real = b("Unsqueeze", b("GreaterOrEqual", position_ids, b.const(0)), b.const([2]))
        for node, problem in problems.items():
            if problem is not None:
                rewriter.missed(node, problem)
            elif rewriter.rewrite("GroupQueryAttention"):
                _fuse(node, position_ids, lengths, real, rewriter)
        rewriter.sweep()
        if rewriter.stats.fired:
            module.model.opset_imports[ORT_DOMAIN] = 1

    def sites(self, module: Module) -> list[ir.Node]:
        """Every standard attention, where caches are retained."""
        if not module.states:
            return []
        return [node for node in module.graph if node.op_type == "Attention" and node.domain == ""]


def _problem(node: ir.Node, position_ids: ir.Value) -> str | None:
    """Why the kernel cannot stand for an attention, or `None` when it can."""
    if does_more(node):
        return "attention counts tokens or keeps a cache by itself"
    keys, values = made_by(node.inputs[1], "TensorScatter"), made_by(node.inputs[2], "TensorScatter")
    if keys is None or values is None or keys is values:
        return "keys or values are not caches of their own"
    for write in (keys, values):
        if not write.outputs[0].is_graph_output():
            return "a cache is not retained"
        if write.attributes["mode"].as_string() != "linear" or list(write.outputs[0].consumers()) != [node]:
            return "a cache is a ring, or something else reads it"
    if keys.inputs[2] is not values.inputs[2]:
        return "keys and values are written to different slots"
    width = size(keys.inputs[0], 3)
    if width is None or width % 8 or width != size(values.inputs[0], 3) or size(node.inputs[0], 1) is None:
        return "keys and values differ in width, or it is no multiple of eight"
    return None if _is_causal(operand(node, 3), position_ids) else "the mask is not plainly causal"


def _is_causal(mask: ir.Value | None, position_ids: ir.Value) -> bool:
    """Whether a mask ``[batch, 1, seq, slots]`` says ``slot <= position`` and nothing else."""
    node = made_by(mask, "LessOrEqual")
    if node is None:
        return False
    slots, positions = made_by(node.inputs[0], "Unsqueeze"), made_by(node.inputs[1], "Unsqueeze")
    row = made_by(slots.inputs[0], "Unsqueeze") if slots is not None else None
    numbers = made_by(row.inputs[0], "Range") if row is not None else None
    return (
        positions is not None
        and positions.inputs[0] is position_ids
        and constant(positions.inputs[1]) == [1, 3]
        and slots is not None
        and constant(slots.inputs[1]) == [1, 2]
        and row is not None
        and constant(row.inputs[1]) == [0]
        and numbers is not None
        and (constant(numbers.inputs[0]), constant(numbers.inputs[2])) == (0, 1)
    )


def _fuse(
    node: ir.Node,
    position_ids: ir.Value,
    lengths: dict[object, list[ir.Value]],
    real: ir.Value | None,
    rewriter: Rewriter,
) -> None:
    """Replace an attention without a `_problem`; `lengths` holds what all layers with caches of one length share.

    The kernel leaves its result for padding as memory happens to be; where `real` is given, ``[batch, seq, 1]``, all
    that is not real becomes zero.
    """
    writes = [w for w in (made_by(v, "TensorScatter") for v in node.inputs[1:3]) if w is not None]
    b = rewriter.at(node)
    past = writes[0].inputs[0]
    assert past is not None and past.shape is not None
    if past.shape[2] not in lengths:
        lengths[past.shape[2]] = _lengths(past, position_ids, rewriter.at(next(iter(rewriter.graph))))
    used, longest, tokens = lengths[past.shape[2]]
    heads, kv_heads, width = size(node.inputs[0], 1), size(writes[0].inputs[0], 1), size(writes[0].inputs[0], 3)
    assert heads and kv_heads and width
    queries = rows(node.inputs[0], heads, width, b)
    new = [rows(w.inputs[1], kv_heads, width, b) for w in writes]
    attributes = {n: node.attributes[n].as_float() for n in ("scale", "softcap") if n in node.attributes}
    kernel = ir.node(
        "GroupQueryAttention",
        [queries, *new, *(w.inputs[0] for w in writes), used, longest, *[None] * 9, tokens],
        {"num_heads": heads, "kv_num_heads": kv_heads, **attributes},
        domain=ORT_DOMAIN,
        num_outputs=3,
    )
    rewriter.insert(kernel, node)
    mixed = kernel.outputs[0]
    mixed.type, mixed.shape = node.outputs[0].type, ir.Shape(queries.shape) if queries.shape is not None else None
    for write, present in zip(writes, kernel.outputs[1:], strict=True):
        rewriter.substitute(write, present)
    if real is not None:
        mixed = b("Where", real, mixed, b.const(0.0, np.float32))
    flat = flattening(node, heads * width)
    if flat is None:
        split = b("Reshape", mixed, b.const([0, 0, heads, width]))
        rewriter.substitute(node, b("Transpose", split, perm=SWAP))
    else:
        rewriter.substitute(flat, mixed)


def _lengths(past: ir.Value, position_ids: ir.Value, b: OpBuilder) -> list[ir.Value]:
    """What the kernel asks about a run, all int32: last slot in use and tokens that are no padding of each row, both
    ``[batch]``, and between the two the longest cache in use, a scalar.

    A row of padding is said to use all slots but the spare ones: none of them is read, and all of them are kept.
    """
    zero, one = b.const(0), b.const([1])
    last = b("ReduceMax", position_ids, one, keepdims=0)
    count = b("Shape", position_ids, start=1, end=2)
    kept = b("Sub", b("Sub", b("Shape", past, start=2, end=3), count), one)
    used = b("Where", b("Less", last, zero), kept, last)
    tokens = b("ReduceSum", b("Cast", b("GreaterOrEqual", position_ids, zero), to=_INT32), one, keepdims=0)
    # Padding of a first chunk may reach further than its tokens.
    longest = b("Max", b("Add", b("ReduceMax", used, keepdims=0), b.const(1)), b("Squeeze", count))
    return [b("Cast", used, to=_INT32), b("Cast", longest, to=_INT32), tokens]
