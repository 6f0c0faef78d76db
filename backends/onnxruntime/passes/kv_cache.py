"""Keep caches in 8 bits: what a run stores is rounded, and what attention reads is made float32 again."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.residents import Resident
from qeff_ir.numerics import Approximates, Numeric
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import constant
from qeff_ir.passing.properties import FAST

_BLOCK = 32
"""Numbers that share an exponent, where so many divide the width of a head."""
_FRACTION = 6
"""Bits of a code behind the point."""
_SMALLEST, _LARGEST = -100, 127
"""Exponents that are stored: of smaller numbers, the scale would leave float32's normal range."""
_EDGE = 2.0**-15
"""What is added to a logarithm before it is cut to a whole number: a power of two must not fall below itself."""


@register
@dataclass(frozen=True, slots=True)
class KvCache(Pass):
    """Keep each token's keys and values in 8 bits, in blocks that share a power of two.

    ``type=mxint8`` is the form of the OCP Microscaling specification, which the AI 100 keeps caches in too
    (``mxint8_kv_cache``): of 32 numbers, whose largest has the exponent ``e``, each is a whole number of
    ``2 ** (e - 6)``. A cache ``[batch, kv_heads, ctx, head_dim]`` becomes int8, with the exponents of a token behind
    its codes: ``[batch, kv_heads, ctx, head_dim + head_dim / 32]``. Blocks are shorter where 32 does not divide the
    width.

    The answers are those of rounded caches: `qeff verify` measures how far they drift. A cache takes a quarter of its
    memory; attention over it is the standard op, which is slower than the kernel for float32 caches.

    Needs: the layout ``tensor-scatter``, and no attention that is fused with the writes of its caches.
    """

    name: ClassVar[str] = "kv-cache"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "tensor-scatter-layout"})
    establishes: ClassVar[frozenset[str]] = frozenset({FAST})
    changes_interface: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Approximates("caches are rounded to 8 bits", 20.0)

    type: Literal["mxint8"] = field(default="mxint8", metadata={"help": "form of the caches"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Change each cache, its write and its readers; report why one cannot be changed."""
        residents = list(module.residents)
        for index, state in enumerate(residents):
            if not state.has_slots or state.dtype != ir.DataType.FLOAT or state.part is not None:
                continue
            past, present = module.input(state.input), module.output(state.output)
            write = present.producer()
            assert write is not None
            problem = _problem(past, write, state)
            if problem is not None:
                rewriter.missed(write, problem)
            elif rewriter.rewrite(self.type):
                residents[index] = _round(past, present, write, state, rewriter)
        module.residents = residents

    def sites(self, module: Module) -> list[ir.Node]:
        """The writes of all float32 caches."""
        caches = [s for s in module.states if s.has_slots and s.dtype == ir.DataType.FLOAT]
        makers = [module.output(state.output).producer() for state in caches]
        return [node for node in makers if node is not None]


def _problem(past: ir.Value, write: ir.Node, state: Resident) -> str | None:
    """Why a cache cannot be changed, or `None` when it can."""
    if write.op_type != "TensorScatter" or write.inputs[0] is not past:
        return f"a {write.op_type} writes the cache"
    if not isinstance(state.shape[3], int):
        return "the width of a head is not known"
    reader = next((n for n in past.consumers() if n is not write and not _looks_at_slots(n)), None)
    return None if reader is None else f"a {reader.op_type} reads the cache of the run before"


def _looks_at_slots(node: ir.Node) -> bool:
    """Whether a node reads other sizes than the width of a head, or takes some of the slots."""
    if node.op_type == "Shape":
        return 0 <= node.attributes.get_int("start", 0) < node.attributes.get_int("end", 4) < 4
    return node.op_type == "Slice" and len(node.inputs) == 4 and constant(node.inputs[3]) == [2]


def _round(past: ir.Value, present: ir.Value, write: ir.Node, state: Resident, rewriter: Rewriter) -> Resident:
    """Change one cache; returns it as it is kept from now on."""
    width = state.shape[3]
    assert isinstance(width, int)
    block = math.gcd(width, _BLOCK)
    slices = [node for node in past.consumers() if node.op_type == "Slice"]
    readers = [(present, write), *((node.outputs[0], node) for node in slices)]
    kept = dataclasses.replace(state, shape=(*state.shape[:3], width + width // block), dtype=ir.DataType.INT8)
    for value in (past, *(value for value, _ in readers)):
        assert value.shape is not None
        value.type = ir.TensorType(kept.dtype)
        value.shape = ir.Shape([*value.shape.dims[:3], kept.shape[3]])
    for value, maker in readers:
        uses = list(value.uses())
        wide = _decoded(value, width, block, rewriter.after(maker))
        for user, place in uses:
            if user is not write:
                user.replace_input_with(place, wide)
    write.replace_input_with(1, _encoded(write.inputs[1], width, block, rewriter.at(write)))
    return kept


def _encoded(new: ir.Value | None, width: int, block: int, b: OpBuilder) -> ir.Value:
    """Float32 ``[batch, heads, seq, width]`` as codes and exponents, int8 ``[batch, heads, seq, width + blocks]``."""

    def number(value: float) -> ir.Value:
        return b.const(value, np.float32)

    blocks = b("Reshape", new, b.const([0, 0, 0, width // block, block]))
    most = b("ReduceMax", b("Abs", blocks), b.const([4]), keepdims=1)
    power = b("Mul", b("Log", most), number(1 / math.log(2)))
    exponent = b("Clip", b("Floor", b("Add", power, number(_EDGE))), number(_SMALLEST), number(_LARGEST))
    scaled = b("Mul", blocks, b("Pow", number(2), b("Sub", number(_FRACTION), exponent)))
    codes = b("Cast", b("Clip", b("Round", scaled), number(-127), number(127)), to=ir.DataType.INT8)
    flat = [b("Reshape", part, b.const([0, 0, 0, -1])) for part in (codes, b("Cast", exponent, to=ir.DataType.INT8))]
    return b("Concat", *flat, axis=3)


def _decoded(stored: ir.Value, width: int, block: int, b: OpBuilder) -> ir.Value:
    """What `_encoded` made as float32 again."""
    assert stored.shape is not None
    codes, exponents = (
        b("Slice", stored, b.const([start]), b.const([end]), b.const([3]))
        for start, end in ((0, width), (width, width + width // block))
    )
    shift = b("Sub", b("Cast", exponents, to=ir.DataType.FLOAT), b.const(_FRACTION, np.float32))
    scales = b("Pow", b.const(2, np.float32), shift)
    shape = [*stored.shape.dims[:3], width]
    return b("DequantizeLinear", codes, scales, axis=3, block_size=block, shape=shape, dtype=ir.DataType.FLOAT)
