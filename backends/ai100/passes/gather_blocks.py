"""Read blocks of a cache where blocks of what was read are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from backends.ai100.operators import CTX_DOMAIN
from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.numerics import Exact, Numeric
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import constant, made_by, operand

_SLOTS = 2
"""The axis of a cache that slots lie on."""


@register
@dataclass(frozen=True, slots=True)
class GatherBlocks(Pass):
    """Replace slices of a `CtxGather` along the slots by a `CtxGatherBlockedKV` each (AI 100 contract §2.2 and §3).

    So no more of a cache is read at a time than attention over blocks of keys works on (pass ``blocked-attention``).
    The zeros that stand for empty slots are sliced too. With rows of a cache, it is `CtxGatherBlockedKVCB`.
    """

    name: ClassVar[str] = "gather-blocks"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    numeric: ClassVar[Numeric] = Exact()
    idempotent: ClassVar[bool] = True

    def sites(self, module: Module) -> list[ir.Node]:
        """The slices."""
        return [node for node in module.graph if _whole(node) is not None]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Replace them."""
        for node in self.sites(module):
            gather, b = _whole(node), rewriter.at(node)
            assert gather is not None
            value = node.inputs[0]
            hidden = None if value is None or value is gather.outputs[0] else value.producer()
            read = _block(gather, node, b)
            if hidden is not None:
                read = b("Where", _sliced(hidden.inputs[0], node, b), hidden.inputs[1], read)
            if rewriter.replace(node, read, read_by(gather)):
                _count(gather, rewriter)
        rewriter.sweep()
        operators.attach(module.model)


def read_by(gather: ir.Node) -> str:
    """The operator that reads a block of what an operator reads."""
    return "CtxGatherBlockedKVCB" if gather.op_type == "CtxGatherCB" else "CtxGatherBlockedKV"


def _whole(node: ir.Node) -> ir.Node | None:
    """What reads the slots that a node takes a block of; `None` of any other node."""
    if node.op_type != "Slice" or node.domain or len(node.inputs) != 4 or constant(node.inputs[3]) != [_SLOTS]:
        return None
    value = node.inputs[0]
    shown = made_by(value, "Where")
    gather = (shown.inputs[2] if shown is not None else value) or value
    found = made_by(gather, "CtxGather", CTX_DOMAIN) or made_by(gather, "CtxGatherCB", CTX_DOMAIN)
    hides = shown is None or (operand(shown, 0) is not None and _rank(shown.inputs[0]) == 4)
    return found if hides else None


def _block(gather: ir.Node, block: ir.Node, b: OpBuilder) -> ir.Value:
    *rows, slots = gather.inputs[:-1]
    part = _sliced(slots, block, b)
    shape = block.outputs[0].shape
    if len(rows) == 1:  # one index for each head
        part = b("Expand", part, b("Concat", b.const([1]), b("Shape", rows[0], start=1, end=2), b.const([1]), axis=0))
    return b(read_by(gather), *rows, part, domain=CTX_DOMAIN, shape=shape, dtype=block.outputs[0].dtype)


def _count(gather: ir.Node, rewriter: Rewriter) -> None:
    """Let whoever asks how many slots are read ask no more of what reads them all."""
    read = gather.outputs[0]
    made = [read, *(out for user in read.consumers() if user.op_type == "Where" for out in user.outputs)]
    for node in [node for value in made for node in value.consumers() if node.op_type == "Shape"]:
        if (node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)) == (_SLOTS, _SLOTS + 1):
            b = rewriter.at(node)
            rewriter.substitute(node, b("Reshape", gather.inputs[-1], b.const([1])))


def _sliced(value: ir.Value | None, block: ir.Node, b: OpBuilder) -> ir.Value:
    """The same block of what has the slots on the same axis."""
    return b("Slice", value, *block.inputs[1:3], b.const([_SLOTS]))


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None
