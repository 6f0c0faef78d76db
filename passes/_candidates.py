"""The tokens that a draw is among: the best ones, cut by top-k, top-p and min-p (AI 100 contract §1.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_ir.passing.base import OpBuilder

from ._draw_inputs import DrawInputs

LEAST = -65504.0
"""Score of a token that may not be drawn: the least number of half precision."""


@dataclass(frozen=True)
class Candidates:
    """The best tokens, the best first.

    Attributes:
        tokens: Their ids, int64 ``[batch, tokens, top]``.
        scores: Divided by the temperature, `LEAST` for those that were cut, float32 of this shape.
        kept: Those that were not cut, bool of this shape. The best token is always one.
    """

    tokens: ir.Value
    scores: ir.Value
    kept: ir.Value

    @classmethod
    def of(cls, scores: ir.Value, given: DrawInputs, b: OpBuilder) -> Candidates:
        """The candidates among all tokens, of which there are as many as there are random numbers for.

        Args:
            scores: float32 ``[batch, tokens, vocab]``.
            given: Settings of the rows.
            b: Where.
        """
        least, zero = b.const(LEAST, np.float32), b.const(0.0, np.float32)

        def of_row(value: ir.Value) -> ir.Value:
            return b("Unsqueeze", value, b.const([2]))

        width = given.width
        cold = b("Equal", given.temperature, zero)
        divisor = of_row(b("Where", cold, b.const(1.0, np.float32), given.temperature))
        shape = [*(scores.shape or ())[:2], width]
        values, tokens = b.several(
            "TopK", b("Div", scores, divisor), b.const([width]), axis=2, largest=1, sorted=1, shapes=[shape, shape]
        )
        all_of_them = b("Less", given.top_k, b.const(1, np.int32))
        limit = of_row(b("Where", all_of_them, b.const(width, np.int32), given.top_k))
        best = b("Less", b.const(np.arange(width), np.int32), limit)
        shares = b("Softmax", b("Where", best, values, least), axis=2)
        tail = b("CumSum", shares, b.const(2), reverse=1)  # of a token and of all that are worse
        likely = b("Greater", tail, of_row(b("Sub", b.const(1.0, np.float32), given.top_p)))
        likely = b("Or", likely, b.const(np.arange(width) == 0, bool))
        first = b("Slice", shares, b.const([0]), b.const([1]), b.const([2]))
        near = b("GreaterOrEqual", shares, b("Mul", first, of_row(given.min_p)))
        kept = b("And", best, b("And", likely, near))
        return cls(tokens, b("Where", kept, values, least), kept)

    def drawn(self, given: DrawInputs, b: OpBuilder) -> ir.Value:
        """One of them, by the Gumbel-max trick, int64 ``[batch, tokens, 1]``.

        The first of the random numbers is that of the worst candidate, as hosts expect that give numbers of their own.
        """
        turned = b("Gather", given.numbers, b.const(np.arange(given.width)[::-1]), axis=-1)
        own = turned if len(given.numbers.shape or ()) == 3 else b("Unsqueeze", turned, b.const([1]))
        noise = b("Neg", b("Log", b("Neg", b("Log", own))))
        # A number of 1 is infinite noise, which must not draw a token that was cut.
        noisy = b("Where", self.kept, b("Add", self.scores, noise), b.const(-np.inf, np.float32))
        return b("GatherElements", self.tokens, b("ArgMax", noisy, axis=2, keepdims=1), axis=2)

    def probabilities(self, scores: ir.Value, b: OpBuilder) -> ir.Value:
        """Those that the candidates have in a draw, and 0 for all others, of the shape of the scores of all tokens."""
        nothing = b("Expand", b.const(LEAST, np.float32), b("Shape", scores), shape=scores.shape)
        return b("Softmax", b("ScatterElements", nothing, self.tokens, self.scores, axis=2), axis=2, shape=scores.shape)
