"""A request trace, driven through transformers and through a session: the definition of "behaves the same".

A trace is a batch of prompts of unequal lengths and a number of greedy decode steps. transformers answers each prefix
in one forward pass without a cache, so that nothing of the cache machinery is shared between the two sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.numerics import error_over_rms
from qeff_ir.runtime.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trace:
    """What a model answers.

    Attributes:
        tokens: Greedy token of each row after each step, int64 ``[steps, batch]``; the first follows the prompt.
        logits: The logits it was chosen from, float32 ``[steps, batch, vocab]``.
    """

    tokens: Array
    logits: Array


@dataclass(frozen=True)
class Comparison:
    """Two traces of the same prompts.

    Attributes:
        errors: ``max|error| / rms`` of the logits of each step.
        agreement: Number of steps before the first token that differs.
    """

    errors: list[float]
    agreement: int

    @property
    def steps(self) -> int:
        """Number of steps compared."""
        return len(self.errors)

    @property
    def error(self) -> float:
        """The largest error of all steps."""
        return max(self.errors)

    def equal(self, limit: float) -> bool:
        """Whether all tokens agree and no error exceeds `limit`."""
        return self.agreement == self.steps and self.error <= limit


def reference_trace(model: PreTrainedModel, prompts: Sequence[Sequence[int]], steps: int) -> Trace:
    """transformers' own answer, one full forward pass for each row and step."""
    import torch

    rows = [list(p) for p in prompts]
    tokens, logits = [], []
    with torch.no_grad():
        for _ in range(steps):
            step = np.stack([model(torch.tensor([row]), use_cache=False).logits[0, -1].float().numpy() for row in rows])
            logits.append(step)
            tokens.append(step.argmax(-1))
            for row, token in zip(rows, tokens[-1], strict=True):
                row.append(int(token))
    return Trace(np.stack(tokens), np.stack(logits))


def session_trace(decoder: Decoder, prompts: Sequence[Sequence[int]], follow: Array) -> Trace:
    """A session's answer: chunked prefill, then one decode step for each token but the last of `follow`.

    Args:
        decoder: The session's driver.
        prompts: As many as the batch has rows.
        follow: The tokens to feed, int64 ``[steps, batch]``: those of the reference, so that one wrong token does not
            make all that follow incomparable.
    """
    logits = [decoder.prefill(prompts)]
    logits += [decoder.decode(tokens) for tokens in follow[:-1]]
    stacked = np.stack(logits)
    return Trace(stacked.argmax(-1), stacked)


def compare(trace: Trace, reference: Trace) -> Comparison:
    """Hold a trace against the reference.

    Raises:
        ValueError: The reference is empty or constant.
    """
    errors = [error_over_rms(a, b) for a, b in zip(trace.logits, reference.logits, strict=True)]
    same = (trace.tokens == reference.tokens).all(axis=1)
    return Comparison(errors, int(np.argmin(same)) if not same.all() else len(same))
