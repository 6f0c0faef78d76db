"""How faithful contenders are: what each makes of the same prompts, beside our float32 row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from benchmarks.ours import NAME
from benchmarks.peers.contender import Contender, Entrant, Rows, RunsAhead
from benchmarks.result import Figure, figure
from qeff_ir.arrays import Array

AGREEMENT, PERPLEXITY = "agreement %", "perplexity"
_SHORTEST = 8
"""Tokens of the shortest prompt."""


@runtime_checkable
class Scores(Protocol):
    """A contender that tells the logits of the next token, from which perplexity follows."""

    def logits(self) -> Array:
        """Those of what it read last, ``[rows, vocab]``."""
        ...


def faithful(entrants: Sequence[Entrant], text: Rows) -> dict[str, dict[str, Figure]]:
    """Figures of each contender by its name; none where our own float32 row does not run.

    Each reads all prompts that the text begins with, from `_SHORTEST` tokens on, so that those that go on with their
    own tokens only can be compared too. The first choice is compared with that of our float32 row; perplexity is
    ``exp`` of the mean ``-log q`` of the text's own next token.

    Args:
        entrants: Who took part.
        text: Tokens of each row of the batch, all of one length.
    """
    running = [(entrant, entrant.contender) for entrant in entrants if entrant.contender is not None]
    base = next((racer for e, racer in running if e.weights == "f32" and racer.name.startswith(NAME)), None)
    if base is None:
        return {}
    right, found = _read(base, text)[0], dict[str, dict[str, Figure]]()
    for _, racer in running:
        choices, surprise = _read(racer, text)
        figures = {AGREEMENT: figure([100 * float((choices == right).mean())], "higher")}
        if surprise is not None:
            figures[PERPLEXITY] = figure([math.exp(surprise)])
        found[racer.name] = figures
    return found


def _read(racer: Contender, text: Rows) -> tuple[Array, float | None]:
    """First choices ``[prompts, rows]``, and the mean ``-log q`` of the text's own next tokens."""
    choices, odds = list[list[int]](), list[float]()
    for length in range(_SHORTEST, len(text[0])):
        choices.append(racer.prefill([row[:length] for row in text]))
        if isinstance(racer, RunsAhead):
            racer.finish()
        if isinstance(racer, Scores):
            odds += [_odds(logits, row[length]) for logits, row in zip(racer.logits(), text, strict=True)]
    return np.array(choices), -float(np.mean(odds)) if odds else None


def _odds(logits: Array, token: int) -> float:
    """Natural logarithm of the probability of a token."""
    numbers = logits.astype(np.float64) - float(logits.max())
    return float(numbers[token] - np.log(np.exp(numbers).sum()))
