"""A pass that splits specializations by phase: short contexts read a part of the caches only (contract §1.1 and §3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import READ_LENGTH, name_of
from qeff_ir.passing import AllSites, Expect, Pass, Phase, Rewriter
from qeff_ir.passing.shapes import carry_on


@dataclass(frozen=True, slots=True)
class ComputeContextLength(Pass):
    """Read as many slots of each cache as ``comp_ctx_lengths`` is long; a run takes the shortest that it fits.

    What is read, where it is hidden, and the masks are all made of one length, and follow it. Rings are read whole.
    Stands behind ``kv-retention{layout=scatter}``. Lengths beyond the context are cut, and the whole context is
    always one.
    """

    name: ClassVar[str] = "compute-context-length"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "scatter-layout"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = AllSites()

    prefill: str = dataclasses.field(default="1024", metadata={"help": "lengths in prefill, with commas"})
    decode: str = dataclasses.field(default="1024", metadata={"help": "lengths in decode, with commas"})

    def sites(self, module: Module) -> list[ir.Node]:
        """What asks for the length of a cache that keeps every token."""
        found = [node for node in module.graph if node.op_type == "Shape" and _is_cache(module, node.inputs[0])]
        return [node for node in found if node.attributes.get_int("start", 0) == 2]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Let the length of the input take the place of that of the caches."""
        sites = self.sites(module)
        if not sites or not rewriter.rewrite("length"):
            return
        symbol = name_of(READ_LENGTH)
        given = ir.val(symbol, shape=ir.Shape([symbol]), dtype=ir.DataType.INT64)
        module.add_input(given, READ_LENGTH)
        module.dims[symbol] = Dim(symbol)
        for node in sites:
            length = rewriter.at(node)("Shape", given, start=0, end=1, shape=[1], dtype=ir.DataType.INT64)
            rewriter.substitute(node, length)
        for node in module.graph:  # the shapes of what is read, and of the positions that masks are made of
            out = node.outputs[0]
            begins = node.op_type == "CtxGather" or (node.op_type == "Unsqueeze" and _is_row(node))
            if begins and out.shape is not None and "ctx_len" in out.shape.dims:
                out.shape = ir.Shape([symbol if d == "ctx_len" else d for d in out.shape.dims])
                carry_on(module.graph, out, "ctx_len", symbol)
        longest = max(s.symbols["ctx_len"] for s in module.specializations)
        module.split(symbol, {"prefill": _lengths(self.prefill, longest), "decode": _lengths(self.decode, longest)})


def _lengths(text: str, longest: int) -> list[int]:
    """Numbers below the longest length, and that one."""
    return sorted({*(int(number) for number in text.split(",") if int(number) < longest), longest})


def _is_cache(module: Module, value: ir.Value | None) -> bool:
    """Whether a value is a cache that keeps every token, or rows of one."""
    whole = {s.ctx_dim for s in module.states if s.has_slots and not s.ring}
    if value is None or value.shape is None or len(value.shape) != 4:
        return False
    dim = value.shape[2]
    return (dim if isinstance(dim, int) else dim.value) in whole


def _is_row(node: ir.Node) -> bool:
    source = node.inputs[0]
    maker = source.producer() if source is not None else None
    return maker is not None and maker.op_type == "Range"
