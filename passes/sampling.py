"""Draw the next tokens in the graph: a run returns tokens in place of logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import EMBEDDED, KEPT_LOGITS, LOGITS, NEXT_TOKENS, PROBABILITIES, Role, name_of
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import Exactly, Expect

from ._candidates import LEAST, Candidates
from ._draw_inputs import DrawInputs, add_inputs
from ._penalties import penalized


@register
@dataclass(frozen=True, slots=True)
class Sampling(Pass):
    """Return ``next_tokens``, int64 ``[batch, tokens, 1]``, in place of ``logits`` (AI 100 contract §1.3).

    Scores are masked (``guided=true``: bool ``token_bitmasks``), penalized, divided by the temperature, and cut to the
    ``top`` best, then by top-k, top-p and min-p; Gumbel noise of given random numbers draws one. At temperature 0 the
    best token is taken. Each row has settings of its own (`qeff_ir.ir.draw.Draw`). ``pdfs=true`` returns the
    probabilities too, ``probs``, float32 ``[batch, tokens, vocab]``.

    Two tables of the tokens that penalties are for, bool ``[rows of the caches, vocab]``, stay on the device. All is
    computed in float32, whatever the model computes in.

    Where several tokens of a row are drawn, to verify drafts, each has random numbers of its own, and all have the
    penalties of what is accepted by the end of the run.

    It is the last pass: it takes the rows that caches have, and the tokens that logits are of.
    """

    name: ClassVar[str] = "sampling"
    phase: ClassVar[Phase] = Phase.RETURN
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"last-logits"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = Exactly("num_decoders")

    pdfs: bool = field(default=False, metadata={"help": "return the probabilities too"})
    top: int = field(default=512, metadata={"help": "tokens to draw from at most, the best ones"})
    guided: bool = field(default=False, metadata={"help": "take a mask of the tokens that are allowed"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Put the draw behind the logits.

        Raises:
            PassError: There are no logits of a row's last tokens, or `top` is less than 1.
        """
        if not module.states:
            return
        logits = self._logits(module)
        head = logits.producer()
        assert head is not None
        if not rewriter.rewrite("draw"):
            return
        given = add_inputs(module, logits, self.top, guided=self.guided)
        b = rewriter.after(head)
        scores = b("Cast", logits, to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT, shape=logits.shape)
        if given.allowed is not None:
            scores = b("Where", b("Unsqueeze", given.allowed, b.const([1])), scores, b.const(LEAST, np.float32))
        scores, seen, answered = penalized(scores, given, module, b)
        found = Candidates.of(scores, given, b)
        results = [(NEXT_TOKENS, _next_tokens(scores, found, given, b))]
        if self.pdfs:
            results = [(PROBABILITIES, found.probabilities(scores, b)), *results]
        _return(module, logits, results, [(given.seen, seen), (given.answered, answered)])
        operators.attach(module.model)

    def _logits(self, module: Module) -> ir.Value:
        logits = module.find(LOGITS)
        shape = None if logits is None or logits.name == EMBEDDED else logits.shape
        made = logits is not None and logits.producer() is not None
        if logits is None or not made or shape is None or len(shape) != 3 or not isinstance(shape[2], int):
            raise PassError("there are no logits to draw from: put sampling into the pipeline of a causal LM, once")
        kept = module.find(KEPT_LOGITS)
        several = kept is not None and kept.shape is not None and shape[1] == kept.shape[0]
        if shape[1] != 1 and not several:
            raise PassError(f"the logits are {shape}, of all tokens: put last-logits into the pipeline")
        if self.top < 1:
            raise PassError(f"top is {self.top}: draw from at least 1 token")
        return logits


def _next_tokens(scores: ir.Value, found: Candidates, given: DrawInputs, b: OpBuilder) -> ir.Value:
    """The best token at temperature 0, one that is drawn elsewhere, ``[batch, tokens, 1]``."""
    best = b("ArgMax", scores, axis=2, keepdims=1)
    cold = b("Equal", b("Unsqueeze", given.temperature, b.const([2])), b.const(0.0, np.float32))
    tokens = b("Where", cold, best, found.drawn(given, b))
    tokens.shape = ir.Shape([*(scores.shape or ())[:2], 1])
    return tokens


def _return(
    module: Module, logits: ir.Value, results: list[tuple[Role, ir.Value]], tables: list[tuple[ir.Value, ir.Value]]
) -> None:
    """Let the results take the place of the logits, and the tables, before and after a run, be states."""
    outputs = module.graph.outputs
    at = outputs.index(logits)
    module.ports.pop(str(logits.name), None)
    outputs.remove(logits)
    for number, (role, value) in enumerate(results):
        value.name = name_of(role)
        outputs.insert(at + number, module.declare(value, role))
    kept = {state.output for state in module.states}
    behind = max(index for index, value in enumerate(outputs) if value.name in kept) + 1
    for number, (before, after) in enumerate(tables):
        after.name = f"{before.name}{Resident.SUFFIX}"
        outputs.insert(behind + number, after)
