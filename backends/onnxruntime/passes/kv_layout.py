"""The caches of ONNX Runtime: a standard op that writes in place."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from passes.kv_layouts import Layout, Slots, layout
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import OpBuilder, Rewriter


@layout("tensor-scatter")
class TensorScatter(Layout):
    """The ONNX Runtime form: one standard op per cache, in place.

    `TensorScatter` writes whole chunks, padding included. What padding writes must stay out of sight:

    - A cache that keeps every token has ``prefill_seq_len`` more slots than the context. A chunk that is padded on the
      right writes beyond the row's last token, where the next tokens go; a chunk of padding only writes to the spare
      slots. Neither is ever seen, because no query's position reaches these slots before a real token has been written.
    - In a ring of ``window + prefill_seq_len - 1`` slots, what the padding of a chunk overwrites is too old for any
      later query. A chunk of padding only writes back what it finds.
    """

    op_type: ClassVar[str] = "TensorScatter"

    def write(self, node: ir.Node, slots: Slots, state: Resident) -> None:
        """``TensorScatter(past, new, first slot)``."""
        past, new = node.inputs[:2]
        b = self.rewriter.at(node)
        mode = "linear"
        if slots.ring:
            mode = "circular"
            found = b("Slice", past, b.const([0]), self._count(), b.const([2]))
            new = b("Where", self._idle_rows(), found, new)
        retained = b("TensorScatter", past, new, self._start(slots), axis=2, mode=mode)
        self.rewriter.substitute(node, retained)

    @classmethod
    def index_rows(cls, module: Module, rewriter: Rewriter, index: ir.Value) -> None:
        """Nothing: the session hands a run its rows of the buffers (`backends.onnxruntime.cache_rows`).

        So all that writes in place goes on to do so.
        """

    def finish(self) -> None:
        """Name the longer caches, and give them their length."""
        module = self.module
        if all(s.ring or not s.has_slots for s in module.states):
            return
        spare = max(s.symbols["seq_len"] for s in module.specializations)
        limit = module.dims["ctx_len"]
        module.dims["cache_len"] = Dim("cache_len")
        module.set_size("cache_len", lambda s: s.symbols["ctx_len"] + spare)
        module.rename_dim("ctx_len", "cache_len")
        module.dims["ctx_len"] = limit
        module.set_size("ctx_len", lambda s: s.symbols["cache_len"] - spare)

    def _first(self) -> ir.Value:
        """Position of the first token of each row, ``[batch]``."""
        return self.shared("first", None, lambda b: b("Gather", self.position_ids, b.const(0), axis=1))

    def _count(self) -> ir.Value:
        """Tokens of this run, ``[1]``."""
        return self.shared("count", None, lambda b: b("Shape", self.position_ids, start=1, end=2))

    def _idle(self) -> ir.Value:
        """True for rows of padding only, ``[batch]``."""
        return self.shared("idle", None, lambda b: b("Less", self._first(), b.const(0)))

    def _idle_rows(self) -> ir.Value:
        """The same, ``[batch, 1, 1, 1]``."""
        return self.shared("idle rows", None, lambda b: b("Unsqueeze", self._idle(), b.const([1, 2, 3])))

    def _start(self, slots: Slots) -> ir.Value:
        """Where each row's chunk goes, ``[batch]``."""

        def make(b: OpBuilder) -> ir.Value:
            if slots.ring:
                first = b("Mod", self._first(), self.length(slots))
                return b("Where", self._idle(), b.const(0), first)
            spare = b("Sub", self.length(slots), self._count())
            return b("Where", self._idle(), spare, self._first())

        return self.shared("start", slots, make)
