"""Write the places where rows of an encoder enter a language model with standard operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import (
    EMBEDDINGS,
    FIRST_ROW,
    LOGITS,
    NEXT_ROW,
    PIXELS,
    PLANES,
    POSITIONS,
    ROWS,
    TOKEN_KINDS,
    TOKENS,
)
from qeff_ir.ir.residents import KINDS, Resident
from qeff_ir.numerics import Exact, Numeric
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect
from qeff_ir.passing.matching import made_by

_INT, _BOOL = ir.DataType.INT64, ir.DataType.BOOL


@register
@dataclass(frozen=True, slots=True)
class ImageMerge(Pass):
    """Lower `MergeRows` and `SpreadTokens`, and say where the rows, or the pixels for them, are between two runs.

    ``rows=retained``: they are states that the host writes once, before the prompt, and that runs only read. Each has
    an output that hands it on (AI 100 contract §1.8). ``rows=given``: they stay inputs of every run. Of an encoder in
    the graph, the pixels are what is retained or given.

    Which row a token stands for is computed once for all places. A model without such places stays as it is.
    """

    name: ClassVar[str] = "image-merge"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_interface: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Exact()
    expect: ClassVar[Expect] = AllSites()

    rows: Literal["retained", "given"] = field(default="retained", metadata={"help": "where the rows are"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Lower each place, then retain the rows.

        Raises:
            PassError: The number of rows is not fixed.
        """
        places: dict[tuple[ir.Value, ir.Value, int], _Places] = {}
        for node in self.sites(module):
            b = rewriter.at(node)
            if node.op_type == "SpreadTokens":
                rewriter.replace(node, _spread(node, b), "tokens")
                continue
            embeds, mask, rows, first = node.inputs
            assert embeds is not None and mask is not None and rows is not None and first is not None
            rows = _whole(rows)
            count = rows.shape[1] if rows.shape is not None else None
            if not isinstance(count, int):
                raise PassError(f"how many rows {rows.name} has is not fixed, and image-merge picks rows by number")
            key = mask, first, count
            if key not in places:
                places[key] = _Places.of(mask, first, count, b)
            found = places[key]
            taken = b("GatherND", rows, found.index, batch_dims=1, shape=embeds.shape, dtype=embeds.dtype)
            merged = b("Where", found.there, taken, embeds, shape=embeds.shape, dtype=embeds.dtype)
            if rewriter.rewrite("rows"):
                _take_over(module.graph, node.outputs[1], found.after)
                rewriter.substitute(node, merged)
        if rewriter.count:
            rewriter.sweep()
        operators.attach(module.model)
        given = [value for value in module.graph.inputs if module.role_of(value) in (ROWS, PIXELS)]
        if self.rows == "retained" and given:
            _retain(module, given, rewriter)

    def sites(self, module: Module) -> list[ir.Node]:
        """Every place where rows enter, or tokens are told by their position."""
        ops = "MergeRows", "SpreadTokens"
        return [node for node in module.graph if node.domain == dialect.DOMAIN and node.op_type in ops]


@dataclass(frozen=True)
class _Places:
    """The rows that the tokens of a mask stand for.

    Attributes:
        index: The row of each token, inside of what there is, ``[batch, seq, 1]``.
        there: Whether it stands for one, ``[batch, seq, 1]``.
        after: The row that the next run begins with, ``[batch, 1]``.
    """

    index: ir.Value
    there: ir.Value
    after: ir.Value

    @classmethod
    def of(cls, mask: ir.Value, first: ir.Value, count: int, b: OpBuilder) -> _Places:
        """Written before the first place that needs it."""
        shape, one = mask.shape, b.const([1])
        tall = None if shape is None else ir.Shape([*shape.dims, 1])
        chosen = b("Cast", mask, to=_INT, shape=shape, dtype=_INT)
        counted = b("CumSum", chosen, b.const(1), shape=shape, dtype=_INT)
        at = b("Add", b("Sub", counted, one, shape=shape, dtype=_INT), first, shape=shape, dtype=_INT)
        there = b("And", mask, b("Less", at, b.const([count]), shape=shape, dtype=_BOOL), shape=shape, dtype=_BOOL)
        below = b("Min", at, b.const([count - 1]), shape=shape, dtype=_INT)
        inside = b("Max", below, b.const([0]), shape=shape, dtype=_INT)
        total = b("ReduceSum", chosen, one, keepdims=1, shape=first.shape, dtype=_INT)
        return cls(
            b("Unsqueeze", inside, b.const([2]), shape=tall, dtype=_INT),
            b("Unsqueeze", there, b.const([2]), shape=tall, dtype=_BOOL),
            b("Add", first, total, shape=first.shape, dtype=_INT),
        )


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let a value stand for another one, as an output of the graph too."""
    if old.is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = new
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new)


def _whole(rows: ir.Value) -> ir.Value:
    """Rows without changes of shape that lead back to their own."""
    value, found = rows, rows
    while (node := made_by(value, "Reshape")) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
        found = value if value.shape == rows.shape else found
    return found


def _spread(node: ir.Node, b: OpBuilder) -> ir.Value:
    """Each position of the context compared with those of the run's tokens."""
    past, values, positions = node.inputs
    one = b.const([1])
    slot = b("Range", b.const(0), b("Squeeze", b("Shape", past, start=2, end=3)), b.const(1))
    here = b("Equal", b("Unsqueeze", positions, one), b("Unsqueeze", slot, one))
    numbers = b("Where", here, b("Unsqueeze", values, one), b.const(0))
    return b("ReduceSum", numbers, b.const([2]), keepdims=0, shape=node.outputs[0].shape, dtype=_INT)


def _retain(module: Module, given: list[ir.Value], rewriter: Rewriter) -> None:
    """Make states of the rows, and bring inputs and outputs into the order of the contract (§1.8)."""
    kinds = {kind.input: name for name, kind in KINDS.items() if kind.shared}
    graph, kept = module.graph, list[ir.Value]()
    last = list(graph)[-1]
    for value in given:
        assert value.shape is not None and value.dtype is not None
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
        state = Resident(0, kinds[str(value.name)], shape, value.dtype)
        module.residents.append(state)
        out = rewriter.after(last)("Identity", value, shape=value.shape, dtype=value.dtype)
        out.name = state.output
        kept.append(out)
    module.residents.sort(key=lambda resident: resident.order)
    front = [v for role in _FRONT for v in graph.inputs if module.role_of(v) is role]
    graph.inputs[:] = [*front, *(v for v in graph.inputs if v not in front)]
    logits, after = module.port(LOGITS), module.port(NEXT_ROW)
    graph.outputs[:] = [logits, *kept, after, *(v for v in graph.outputs if v not in (logits, after))]


_FRONT = (EMBEDDINGS, TOKENS, ROWS, PIXELS, POSITIONS, FIRST_ROW, PLANES, *TOKEN_KINDS)
"""Roles of inputs in the order of the contract; states and adapters follow."""
