"""The caches of the AI 100: written by a scatter, and read by a gather that skips slots without a token."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from backends.ai100.operators import CTX_DOMAIN
from backends.ai100.passes import _cache_rows
from backends.ai100.passes._cache_rows import DROPPED
from passes.kv_layouts import Layout, Slots, layout
from qeff_ir.ir.module import Module
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.matching import operand


@layout("scatter")
class Scatter(Layout):
    """The AI 100 form (contract §2 and §3): custom scatter and gather ops that skip indices out of range."""

    op_type: ClassVar[str] = "CtxScatter"

    @staticmethod
    def mark(b: OpBuilder, table: ir.Value, rows: ir.Value, tokens: ir.Value, which: ir.Value) -> ir.Value:
        """``CtxScatterCB3D``, which skips what is not to be set (contract §2.1)."""
        slots = b("Where", which, tokens, b.const(DROPPED))
        marks = b("Expand", b.const(True, np.bool_), b("Shape", tokens), dtype=ir.DataType.BOOL)
        return b(
            "CtxScatterCB3D", table, rows, slots, marks, domain=CTX_DOMAIN, shape=table.shape, dtype=ir.DataType.BOOL
        )

    def write(self, node: ir.Node, slots: Slots, state: Resident) -> None:
        """``past -> CtxScatter -> retained``; the layer reads ``CtxGather(retained)``."""
        past, new = node.inputs[:2]
        b = self.rewriter.at(node)
        shape = ir.Shape(state.shape)
        readers = list(node.outputs[0].consumers())
        retained = b("CtxScatter", past, self._written(slots), new, domain=CTX_DOMAIN)
        read = b(
            "CtxGather",
            retained,
            self._read(slots),
            self.shared("count", slots, lambda b: b("Squeeze", self.length(slots))),
            domain=CTX_DOMAIN,
            shape=shape,
        )
        # The mask hides what a key slot without a token gives; anything else must not even see it.
        masked = state.kind == "key" and all(_hides_keys(reader, node.outputs[0]) for reader in readers)
        if not masked:
            empty = self.shared("empty rows", slots, lambda b: b("Unsqueeze", self._empty(slots), b.const([1, 3])))
            read = b("Where", empty, b.const(0.0, np.float32), read, shape=shape)
        for reader in readers:
            for index, value in enumerate(reader.inputs):
                if value is node.outputs[0]:
                    reader.replace_input_with(index, read)
        self.rewriter.substitute(node, retained)

    @classmethod
    def index_rows(cls, module: Module, rewriter: Rewriter, index: ir.Value) -> None:
        """The operators take the rows beside the slots."""
        _cache_rows.index_rows(module, rewriter, index)

    def _written(self, slots: Slots) -> ir.Value:
        """Slot of each token of this run, ``[batch, seq]``, `DROPPED` for padding."""

        def make(b: OpBuilder) -> ir.Value:
            slot = b("Mod", self.position_ids, self.length(slots)) if slots.ring else self.position_ids
            return b("Where", self.padded(), b.const(DROPPED), slot)

        return self.shared("written", slots, make)

    def _empty(self, slots: Slots) -> ir.Value:
        """True for slots that hold no token yet, ``[batch, length]``."""
        return self.shared("empty", slots, lambda b: b("Greater", self.slot_range(slots), self.last()))

    def _read(self, slots: Slots) -> ir.Value:
        """Slots to read, ``[batch, 1, length]``, `DROPPED` for empty ones."""

        def make(b: OpBuilder) -> ir.Value:
            index = b("Where", self._empty(slots), b.const(DROPPED), self.slot_range(slots))
            return b("Unsqueeze", index, b.const([1]))

        return self.shared("read", slots, make)


def _hides_keys(reader: ir.Node, cache: ir.Value) -> bool:
    """Whether a reader takes a cache for keys alone, and never looks at the score of a hidden one: a mask of floats is
    added to it, and NaN stays NaN."""
    attention = reader.op_type in ("Attention", "SinkAttention")
    mask = operand(reader, 3) if attention else None
    others = [value for index, value in enumerate(reader.inputs) if index != 1]
    return mask is not None and mask.dtype is ir.DataType.BOOL and cache not in others
