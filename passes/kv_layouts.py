"""What a physical layout of the caches is. Each target has its own: a class with a name, `layout("scatter")`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import onnx_ir as ir

from qeff_ir.errors import PassError, PipelineError
from qeff_ir.ir import dialect
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import POSITIONS
from qeff_ir.ir.residents import DimValue, Resident
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.properties import PROPERTIES, define


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
        self.position_ids = module.port(POSITIONS)
        self._made: dict[tuple[object, ...], ir.Value] = {}
        # Shared computations stand before the first node, where every layer can read them.
        self.b: OpBuilder = rewriter.at(next(iter(module.graph)))

    op_type: ClassVar[str]
    """Operator that writes a cache."""

    @abstractmethod
    def write(self, node: ir.Node, slots: Slots, state: Resident) -> None:
        """Lower one `CacheUpdate`."""

    @classmethod
    def index_rows(cls, module: Module, rewriter: Rewriter, index: ir.Value) -> None:
        """Let the graph continue those rows of the caches that a run names.

        Args:
            module: Lowered; its caches have the layout.
            rewriter: Of the pass ``continuous-batching``.
            index: The input that names them, int64 ``[batch, 1]``.

        Raises:
            PassError: The layout does not say how.
        """
        raise PassError(f"the layout of {cls.op_type} has no rows that a run names: leave out continuous-batching")

    def finish(self) -> None:
        """Adjust the interface once all nodes are lowered."""

    @staticmethod
    def mark(b: OpBuilder, table: ir.Value, rows: ir.Value, tokens: ir.Value, which: ir.Value) -> ir.Value:
        """Set entries of a table that is kept between runs; here in standard operators.

        Args:
            b: Where.
            table: bool ``[rows, vocab]``.
            rows: The row of each row of the run, int64 ``[batch, 1]``; -1 for one that has no entry to set.
            tokens: Entries, int64 ``[batch, seq]``.
            which: Those of the tokens that are to be set, bool ``[batch, seq]``; others may be out of range.
        """
        spare = b("Slice", table, b.const([0]), b.const([1]), b.const([1]))  # takes what is not to be set
        width = b("Squeeze", b("Shape", table, start=1, end=2))
        columns = b("Unsqueeze", b("Where", which, tokens, width), b.const([2]))
        index = b("Concat", b("Expand", b("Unsqueeze", rows, b.const([2])), b("Shape", columns)), columns, axis=2)
        wide = b("Concat", table, spare, axis=1)
        marked = b("ScatterND", wide, index, b("Expand", b.const(True, bool), b("Shape", tokens)))
        return b("Slice", marked, b.const([0]), b("Shape", table, start=1, end=2), b.const([1]), shape=table.shape)

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

    def shared(self, what: str, slots: Slots | None, make: Callable[[OpBuilder], ir.Value]) -> ir.Value:
        """The value called `what` for these slots, made on first use."""
        key = (what, *(slots.key if slots else ()))
        if key not in self._made:
            self._made[key] = make(self.b)
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


L = TypeVar("L", bound=type[Layout])
LAYOUTS: dict[str, type[Layout]] = {}
"""The layouts by the value of the option ``layout``."""


def layout(name: str) -> Callable[[L], L]:
    """Class decorator that makes a layout known by a name, and ``<name>-layout`` a property that passes can require.

    Raises:
        PipelineError: Another class has that name.
    """

    def add(cls: L) -> L:
        known = LAYOUTS.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PipelineError(f"two layouts are named '{name}': {known.__module__} and {cls.__module__}; rename one")
        LAYOUTS[name] = cls
        if f"{name}-layout" not in PROPERTIES:

            def problem(module: Module) -> str | None:
                return _other_writer(module, name)

            problem.__doc__ = f"Caches have the layout {name}: the operator of another writes none."
            define(f"{name}-layout")(problem)
        return cls

    return add


def _other_writer(module: Module, name: str) -> str | None:
    others = {cls.op_type for other, cls in LAYOUTS.items() if other != name} - {LAYOUTS[name].op_type}
    node = next((node for node in module.graph if node.op_type in others), None)
    return None if node is None else f"{node.op_type} '{node.outputs[0].name}' writes a cache"
