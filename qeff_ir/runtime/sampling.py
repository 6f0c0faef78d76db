"""How the next token of one job is chosen of its logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.jobs import Constraint, Sampling

_HEAD = 1024
"""So many of the best tokens are sorted first, then eight times as many, until their shares are enough for top p."""

_BLOCK = 256
"""So many shares are summed at a time."""


class Chooser:
    """Chooses the tokens of one job.

    Tokens are drawn by the inverse of the distribution function over token ids in ascending order, from one number for
    each token: what a seed gives depends continuously on the logits, and on no other job.

    Args:
        sampling: The settings.
        prompt: The tokens before the answer.
        constraint: What each token may be.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        self._sampling, self._constraint = sampling, constraint
        s = sampling
        self._repeats = s.repetition_penalty != 1
        self._counts = dict[int, int]() if s.presence_penalty or s.frequency_penalty else None
        self._changes = bool(self._repeats or self._counts is not None or s.bias or constraint is not None)
        self._seen = set(prompt) if self._repeats else set[int]()
        self._seen_ids = np.array(sorted(self._seen), dtype=np.int64)
        self._random = np.random.default_rng(s.seed) if s.temperature else None
        self._bias = np.array(list(s.bias), dtype=np.int64), np.array(list(s.bias.values()), dtype=np.float32)

    def choose(self, logits: Array) -> int:
        """The next token.

        Args:
            logits: float32 ``[vocab]``; they stay as they are.

        Raises:
            RuntimeInputError: The constraint allows no token.
            QeffError: The constraint fails.
        """
        scores = self._changed(logits.copy()) if self._changes else logits
        token = int(scores.argmax()) if self._random is None else self._drawn(scores, float(self._random.random()))
        self.heed(token)
        return token

    def heed(self, token: int) -> None:
        """Take note of the token that was chosen."""
        if self._repeats and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = np.append(self._seen_ids, token)
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self._constraint.advance(token)

    def told(self, logits: Array, token: int) -> tuple[float | None, list[tuple[int, float]]]:
        """The log probability of a token, and the best tokens with theirs, where they are asked for."""
        wanted = self._sampling.logprobs
        if wanted is None:
            return None, []
        top = float(logits.max())
        total = top + float(np.log(np.exp(logits - top, dtype=np.float64).sum()))
        best = _best(logits, min(wanted, len(logits)))
        return float(logits[token]) - total, [(int(t), float(logits[t]) - total) for t in best]

    def _changed(self, scores: Array) -> Array:
        """Scores after penalties, bias and mask, in the order of `Sampling`."""
        s = self._sampling
        if self._repeats and self._seen:
            own = scores[self._seen_ids]
            scores[self._seen_ids] = np.where(own > 0, own / s.repetition_penalty, own * s.repetition_penalty)
        if self._counts:
            ids = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
            often = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            scores[ids] -= s.presence_penalty + s.frequency_penalty * often
        if s.bias:
            scores[self._bias[0]] += self._bias[1]
        if self._constraint is not None:
            allowed = self._constraint.mask()
            if not allowed.any():
                raise RuntimeInputError("the constraint allows no token: check its grammar and the stop tokens")
            scores[~allowed] = -np.inf
        return scores

    def _drawn(self, scores: Array, number: float) -> int:
        """The token at a number from 0 to 1 of the distribution, token ids in ascending order."""
        s = self._sampling
        with np.errstate(over="ignore"):  # nearly 0 degrees: all but the best are minus infinity
            scores = (scores - scores.max()) / np.float32(s.temperature)
        ids = _best(scores, s.top_k) if 0 < s.top_k < len(scores) else None
        if s.top_p < 1:
            ids = _nucleus(scores, ids, s.top_p)
        if s.min_p > 0:
            ids = np.arange(len(scores)) if ids is None else ids
            ids = ids[scores[ids] >= np.log(s.min_p)]
        if ids is None:
            return _place(np.exp(scores), number)
        ids = np.sort(ids)
        return int(ids[_place(np.exp(scores[ids]), number)])


def _place(shares: Array, number: float) -> int:
    """Where the running sum of shares first exceeds a number from 0 to 1 of all of it.

    Sums of blocks come first: a running sum in double precision over a vocabulary takes longer than all else here.
    """
    starts = np.arange(0, len(shares), _BLOCK)
    blocks = np.add.reduceat(shares, starts, dtype=np.float64).cumsum()
    wanted = number * blocks[-1]
    block = min(int(np.searchsorted(blocks, wanted, side="right")), len(blocks) - 1)
    own = shares[starts[block] : starts[block] + _BLOCK]
    sums = own.cumsum(dtype=np.float64) + (blocks[block - 1] if block else 0.0)
    return int(starts[block]) + min(
        int(np.searchsorted(sums, wanted, side="right")), int(own.nonzero()[0].max(initial=0))
    )


def _best(scores: Array, count: int) -> Array:
    """The ids of the best scores, the best first; of equal ones, the lower ids."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    ids = np.flatnonzero(scores >= np.partition(scores, len(scores) - count)[len(scores) - count])
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def _nucleus(scores: Array, ids: Array | None, top_p: float) -> Array:
    """The fewest best ids whose share of the probability of all is at least `top_p`; `ids` are sorted."""
    wanted = top_p * float(np.exp(scores if ids is None else scores[ids]).sum(dtype=np.float64))
    size = _HEAD
    while True:
        head = _best(scores, min(size, len(scores))) if ids is None else ids
        sums = np.exp(scores[head]).cumsum(dtype=np.float64)
        if ids is not None or size >= len(scores) or sums[-1] >= wanted:
            return head[: int(np.searchsorted(sums, wanted)) + 1]
        size *= 8
