"""Scores are lowered for tokens that a request has had: two tables of them stay between runs (AI 100 contract §1.3)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import CACHE_ROW, POSITIONS
from qeff_ir.passing.base import OpBuilder

from ._draw_inputs import BATCH, DrawInputs
from .kv_layouts import LAYOUTS, Layout


def penalized(scores: ir.Value, given: DrawInputs, module: Module, b: OpBuilder) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Note the tokens of a run, then penalize.

    A row that starts at position 0 has had nothing. A run of more tokens than it returns is one of a prompt, whose
    tokens are in no answer. Padding, and a row of it, changes nothing.

    Args:
        scores: float32 ``[batch, tokens, vocab]``.
        given: Tables before the run, tokens of the run, and penalties.
        module: Its layout says how a table is written.
        b: Where.

    Returns:
        The scores, and after the run the table of prompts and answers, and that of answers.
    """
    tables = _Tables(given, module, b)
    positions = module.port(POSITIONS)
    real = b("And", b("GreaterOrEqual", positions, b.const(0)), b("GreaterOrEqual", given.accepted, b.const(0)))
    first = b("Slice", positions, b.const([0]), b.const([1]), b.const([1]))
    new = b("Equal", first, b.const(0))
    prompt = b("Greater", b("Shape", positions, start=1, end=2), b("Shape", scores, start=1, end=2))
    seen = tables.marked(tables.cleared(given.seen, new), given.accepted, real)
    reset = b("Or", new, b("And", prompt, b("GreaterOrEqual", first, b.const(0))))
    of_answer = b("And", real, b("Not", prompt))
    answered = tables.marked(tables.cleared(given.answered, reset), given.accepted, of_answer)
    one, zero = b.const(1.0, np.float32), b.const(0.0, np.float32)
    factor = b("Where", tables.of_run(seen), b("Unsqueeze", given.repetition, b.const([2])), one)
    negative = b("Less", scores, zero)
    scores = b("Where", negative, b("Mul", scores, factor), b("Div", scores, factor), shape=scores.shape)
    less = b("Where", tables.of_run(answered), b("Unsqueeze", given.presence, b.const([2])), zero)
    return b("Sub", scores, less, shape=scores.shape), seen, answered


class _Tables:
    """Reads and writes rows of tables: those of a run, or where caches have rows of their own, those that it names."""

    def __init__(self, given: DrawInputs, module: Module, b: OpBuilder) -> None:
        self.b = b
        own = given.seen.shape is not None and given.seen.shape[0] == BATCH
        self.named = None if own else module.find(CACHE_ROW)
        self.layout = next((cls for name, cls in LAYOUTS.items() if f"{name}-layout" in module.properties), Layout)
        if self.named is None:
            batch = b("Squeeze", b("Shape", module.port(POSITIONS), start=0, end=1))
            self.rows = b("Unsqueeze", b("Range", b.const(0), batch, b.const(1)), b.const([1]))
        else:
            self.rows = self.named

    def cleared(self, table: ir.Value, which: ir.Value) -> ir.Value:
        """The table without what it has of some rows of the run, bool ``[batch, 1]``."""
        b = self.b
        if self.named is None:
            return b("And", table, b("Not", which), shape=table.shape)
        count = b("Squeeze", b("Shape", table, start=0, end=1))
        own = b("Equal", self.rows, b("Unsqueeze", b("Range", b.const(0), count, b.const(1)), b.const([0])))
        hit = b("Cast", b("And", own, which), to=ir.DataType.FLOAT)
        left = b("Equal", b("ReduceMax", hit, b.const([0]), keepdims=0), b.const(0.0, np.float32))
        return b("And", table, b("Unsqueeze", left, b.const([1])), shape=table.shape)

    def marked(self, table: ir.Value, tokens: ir.Value, which: ir.Value) -> ir.Value:
        """The table with some of the tokens of a run."""
        return self.layout.mark(self.b, table, self.rows, tokens, which)

    def of_run(self, table: ir.Value) -> ir.Value:
        """The rows of the run, bool ``[batch, 1, vocab]``."""
        b = self.b
        if self.named is None:
            return b("Unsqueeze", table, b.const([1]))
        return b("Gather", table, b("Max", self.rows, b.const(0)), axis=0)  # an idle row has -1
