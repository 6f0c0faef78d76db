"""A kind of retained state with the pass that adds it: which tokens a request has seen, for a penalty on repetitions.

The row of `KINDS` gives names, order and what a run does to the state; sessions, packages and checks need no more. For
the AI 100, whose contract lists the names of states, `backends/ai100/contract.py` would have to know this one too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir import residents
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import LOGITS, POSITIONS, TOKENS
from qeff_ir.ir.residents import Kind, Resident
from qeff_ir.passing import Exactly, Expect, Pass, Phase, Rewriter

SEEN = residents.define(Kind("seen", "past_seen.{layer}", "replace"))


@dataclass(frozen=True, slots=True)
class RepetitionPenalty(Pass):
    """Divide positive scores of tokens that the request has seen by ``penalty``, and multiply negative ones by it.

    Padding, position -1, is not seen; a row that starts at position 0 has seen nothing.
    """

    name: ClassVar[str] = "repetition-penalty"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"last-logits"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = Exactly("num_decoders")

    penalty: float = dataclasses.field(default=1.3, metadata={"help": "factor of the scores"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Add the state, and the penalty behind the logits."""
        logits, ids, positions = module.port(LOGITS), module.port(TOKENS), module.port(POSITIONS)
        head = logits.producer()
        assert head is not None and logits.shape is not None
        if not rewriter.rewrite("penalty"):
            return
        vocabulary = logits.shape.dims[-1]
        state = Resident(0, SEEN.name, ("batch_size", int(str(vocabulary))), ir.DataType.FLOAT)
        past = ir.val(state.input, shape=ir.Shape(state.shape), dtype=state.dtype)
        b = rewriter.after(head)
        first = b("Slice", positions, b.const([0]), b.const([1]), b.const([1]))
        before = b("Where", b("Equal", first, b.const(0)), b.const(0.0, "float32"), past)
        real = b("Cast", b("GreaterOrEqual", positions, b.const(0)), to=ir.DataType.FLOAT)
        here = b("OneHot", ids, b.const(vocabulary), b.const([0, 1], "float32"), axis=-1)
        of_run = b("ReduceMax", b("Mul", here, b("Unsqueeze", real, b.const([2]))), b.const([1]), keepdims=0)
        now = b("Max", before, of_run)
        factor = b.const(self.penalty, "float32")
        lower = b(
            "Where", b("Less", logits, b.const(0.0, "float32")), b("Mul", logits, factor), b("Div", logits, factor)
        )
        seen = b("Greater", b("Unsqueeze", now, b.const([1])), b.const(0.0, "float32"))
        changed = b("Where", seen, lower, logits)
        outputs, name = module.graph.outputs, logits.name
        outputs[outputs.index(logits)] = changed
        logits.name, changed.name, now.name = f"{name}.plain", name, state.output
        module.residents = sorted([*module.residents, state], key=lambda r: r.order)
        at = module.states.index(state)
        module.graph.inputs.insert(len(module.graph.inputs) - len(module.states) + 1 + at, past)
        outputs.insert(1 + at, now)
