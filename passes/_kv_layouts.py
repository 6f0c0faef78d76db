"""The physical layouts that `kv-retention` can choose from, each one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir import dialect
from qeff_ir.device_ops import CTX_DOMAIN
from qeff_ir.module import Dim, DimValue, Module, Specialization, State
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.matching import operand

DROPPED = 2**31 - 1
"""Index that the AI 100 neither writes nor reads (contract §2.2)."""


@dataclass(frozen=True)
class Slots:
    """What all caches of one length and kind have in common.

    Attributes:
        length: Symbol or size of the context axis.
        ring: Whether slots are reused.
        past: Any cache of the kind, to read the length from.
    """

    length: DimValue
    ring: bool
    past: ir.Value

    @property
    def key(self) -> tuple[DimValue, bool]:
        """Caches with equal keys share their index computations."""
        return self.length, self.ring


class Layout(ABC):
    """Lowers cache writes and slot positions; index computations are made once for all layers of a kind."""

    def __init__(self, module: Module, rewriter: Rewriter) -> None:
        self.module = module
        self.rewriter = rewriter
        self.position_ids = module.input("position_ids")
        self._made: dict[tuple[object, ...], ir.Value] = {}
        # Shared computations stand before the first node, where every layer can read them.
        self.b: OpBuilder = rewriter.at(next(iter(module.graph)))

    op_type: ClassVar[str]
    """Operator that writes a cache."""

    @abstractmethod
    def write(self, node: ir.Node, slots: Slots, state: State) -> None:
        """Lower one `CacheUpdate`."""

    def finish(self) -> None:
        """Adjust the interface once all nodes are lowered."""

    def positions(self, node: ir.Node, slots: Slots) -> ir.Value:
        """Lower one `CachePositions`: ``[1 or batch, length]``."""
        if slots.ring:
            made = self.shared("ring positions", slots, lambda b: self._ring_positions(slots, b))
            made.shape = node.outputs[0].shape
            return made
        made = self.shared("row", slots, lambda b: b("Unsqueeze", self.slot_range(slots), b.const([0])))
        made.shape = ir.Shape([1, slots.length])  # the same for all rows
        return made

    def _ring_positions(self, slots: Slots, b: OpBuilder) -> ir.Value:
        last, length, slot = self.last(), self.length(slots), self.slot_range(slots)
        this_turn = b("Add", slot, b("Mul", b("Div", last, length), length))
        position = b("Where", b("LessOrEqual", this_turn, last), this_turn, b("Sub", this_turn, length))
        return b("Where", b("Less", position, b.const(0)), b.const(dialect.UNWRITTEN), position)

    def shared(self, what: str, slots: Slots | None, make: object) -> ir.Value:
        """The value called `what` for these slots, made on first use."""
        key = (what, *(slots.key if slots else ()))
        if key not in self._made:
            self._made[key] = make(self.b)  # type: ignore[operator]
        return self._made[key]

    def last(self) -> ir.Value:
        """The last position of each row in this run, ``[batch, 1]``; -1 for a row of padding."""
        return self.shared("last", None, lambda b: b("ReduceMax", self.position_ids, b.const([1]), keepdims=1))

    def length(self, slots: Slots) -> ir.Value:
        """Number of slots, ``[1]``."""
        return self.shared("length", slots, lambda b: b("Shape", slots.past, start=2, end=3))

    def slot_range(self, slots: Slots) -> ir.Value:
        """``0 .. length-1``, ``[length]``."""
        return self.shared(
            "range",
            slots,
            lambda b: b("Range", b.const(0), b("Squeeze", self.length(slots)), b.const(1)),
        )

    def padded(self) -> ir.Value:
        """True for padding, ``[batch, seq]``."""
        return self.shared("padded", None, lambda b: b("Less", self.position_ids, b.const(0)))


def _hides_keys(reader: ir.Node, cache: ir.Value) -> bool:
    """Whether a reader takes a cache for keys alone, and never looks at the score of a hidden one: a mask of floats is
    added to it, and NaN stays NaN."""
    attention = reader.op_type in ("Attention", "SinkAttention")
    mask = operand(reader, 3) if attention else None
    others = [value for index, value in enumerate(reader.inputs) if index != 1]
    return mask is not None and mask.dtype is ir.DataType.BOOL and cache not in others


class Scatter(Layout):
    """The AI 100 form (contract §2 and §3): custom scatter and gather ops that skip indices out of range."""

    op_type: ClassVar[str] = "CtxScatter"

    def write(self, node: ir.Node, slots: Slots, state: State) -> None:
        """``past -> CtxScatter -> retained``; the layer reads ``CtxGather(retained)``."""
        past, new = node.inputs[:2]
        b = self.rewriter.at(node)
        shape, dtype = ir.Shape(state.shape), node.outputs[0].dtype
        readers = list(node.outputs[0].consumers())
        retained = b("CtxScatter", past, self._written(slots), new, domain=CTX_DOMAIN, shape=shape, dtype=dtype)
        read = b(
            "CtxGather",
            retained,
            self._read(slots),
            self.shared("count", slots, lambda b: b("Squeeze", self.length(slots))),
            domain=CTX_DOMAIN,
            shape=shape,
            dtype=dtype,
        )
        # The mask hides what a key slot without a token gives; anything else must not even see it.
        masked = state.role == "key" and all(_hides_keys(reader, node.outputs[0]) for reader in readers)
        if not masked:
            empty = self.shared("empty rows", slots, lambda b: b("Unsqueeze", self._empty(slots), b.const([1, 3])))
            read = b("Where", empty, b.const(0.0, np.float32), read, shape=shape, dtype=dtype)
        for reader in readers:
            for index, value in enumerate(reader.inputs):
                if value is node.outputs[0]:
                    reader.replace_input_with(index, read)
        self.rewriter.substitute(node, retained)

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

    def write(self, node: ir.Node, slots: Slots, state: State) -> None:
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

    def finish(self) -> None:
        """Name the longer caches, and give them their length."""
        module = self.module
        if all(s.ring or not s.has_slots for s in module.states):
            return
        spare = max(s.symbols["seq_len"] for s in module.specializations)
        module.specializations = [
            Specialization(s.name, {**s.symbols, "cache_len": s.symbols["ctx_len"] + spare})
            for s in module.specializations
        ]
        limit = module.dims["ctx_len"]
        module.rename_dim("ctx_len", "cache_len")
        module.dims["cache_len"] = Dim("cache_len")
        module.dims["ctx_len"] = limit
        module.specializations = [
            Specialization(s.name, {**s.symbols, "ctx_len": s.symbols["cache_len"] - spare})
            for s in module.specializations
        ]

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


LAYOUTS: dict[str, type[Layout]] = {"scatter": Scatter, "tensor-scatter": TensorScatter}
"""The layouts by option value."""
