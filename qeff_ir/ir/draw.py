"""How a graph that draws tokens is to draw them: one setting for each row of a run (AI 100 contract §1.3)."""

from __future__ import annotations

from dataclasses import dataclass

from qeff_ir.arrays import Array


@dataclass(frozen=True, slots=True)
class Draw:
    """Settings of the rows of one run; an array that is not given asks for nothing.

    Attributes:
        temperature: What scores are divided by, float32 ``[batch]``; 0 takes the best token. 0 by default.
        top_k: Tokens to draw from, the best ones, int32 ``[batch]``; 0 and less, the default, is as many as the graph
            sorts.
        top_p: The best tokens are drawn from whose probabilities reach this sum, float32 ``[batch]``. 1 by default.
        min_p: Least probability, as a share of that of the best token, float32 ``[batch]``. 0 by default.
        repetition: Scores of tokens in the prompt and the answer are divided by this, and multiplied where they are
            negative, float32 ``[batch]``. 1 by default.
        presence: What is taken from the scores of tokens in the answer, float32 ``[batch]``. 0 by default.
        numbers: Uniform random numbers between 0 and 1, float32 ``[batch, top]``, or ``[batch, tokens, top]`` for a
            graph that draws several tokens of a row.
        allowed: Tokens that may be drawn, bool ``[batch, vocab]``. All of them by default.
    """

    temperature: Array | None = None
    top_k: Array | None = None
    top_p: Array | None = None
    min_p: Array | None = None
    repetition: Array | None = None
    presence: Array | None = None
    numbers: Array | None = None
    allowed: Array | None = None
