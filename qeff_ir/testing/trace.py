"""A request trace, driven through transformers and through a session: the definition of "behaves the same".

A trace is a batch of prompts of unequal lengths and a number of greedy decode steps. transformers answers each prefix
in one forward pass without a cache, so that nothing of the cache machinery is shared between the two sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.numerics import error_over_rms
from qeff_ir.runtime.decoder import Decoder

if TYPE_CHECKING:
    import torch
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


def reference_trace(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    steps: int,
    beside: Sequence[Mapping[str, torch.Tensor]] = (),
    *,
    follow: Array | None = None,
) -> Trace:
    """transformers' own answer, one full forward pass for each row and step.

    Args:
        model: The model.
        prompts: Token ids of each row.
        steps: How many tokens to answer with.
        follow: The tokens to feed, int64 ``[steps, batch]``, in place of those that the model chooses.
        beside: What each row's forward pass takes beside them, types of tokens among it; nothing by default.
    """
    import torch

    rows = [list(p) for p in prompts]
    given = beside or [dict[str, torch.Tensor]() for _ in rows]
    tokens, logits = [], []
    with torch.no_grad():
        for count in range(steps):
            made = [
                model(torch.tensor([row]), use_cache=False, **_grown(model, own, count)).logits[0, -1].float().numpy()
                for row, own in zip(rows, given, strict=True)
            ]
            step = np.stack(made)
            logits.append(step)
            tokens.append(step.argmax(-1))
            for row, token in zip(rows, tokens[-1] if follow is None else follow[count], strict=True):
                row.append(int(token))
    return Trace(np.stack(tokens), np.stack(logits))


def _grown(model: PreTrainedModel, beside: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """What stands beside a prompt and `count` new tokens, which have types too."""
    from qeff_ir.frontend.private import with_new_tokens

    types = {name: value for name, value in beside.items() if name.endswith("token_type_ids")}
    return {**beside, **with_new_tokens(model, types, count)} if types and count else dict(beside)


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
