"""The tokens of a job over a graph that draws them itself: its settings go with each run, and tokens come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir.draw import Draw
from qeff_ir.runtime.jobs import Job, Sampling


class Drawn:
    """Stands for a `qeff_ir.runtime.sampling.Chooser`; what that computes of logits, the graph has done.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self.sampling, self.constraint = job.sampling, job.constraint
        self._random = np.random.default_rng(job.sampling.seed) if job.sampling.temperature else None

    def numbers(self, top: int) -> Array:
        """Random numbers of the next token, float32 ``[top]``; any where none is drawn."""
        if self._random is None:
            return np.full(top, 0.5, dtype=np.float32)
        return self._random.random(top, dtype=np.float32)

    def choose(self, returned: Array) -> int:
        """The token that a run has returned, int64 ``[1]``."""
        token = int(returned[0])
        if self.constraint is not None:
            self.constraint.advance(token)
        return token

    def told(self, returned: Array, token: int) -> tuple[float | None, list[tuple[int, float]]]:
        """Nothing: there are no log probabilities."""
        return None, []


def check(job: Job, top: int, *, guided: bool, tells_prompts: bool) -> None:
    """Refuse what the graph does not do.

    Args:
        job: The job.
        top: Tokens that it draws from at most; ``top_k=0`` is all of them.
        guided: Whether it takes a mask.
        tells_prompts: Whether it can tell tokens of a prompt from those of an answer.

    Raises:
        RuntimeInputError: The job asks for it.
    """
    sampling, why = job.sampling, "needs logits, and the package draws its tokens itself"
    for name in ("frequency_penalty", "bias"):
        if getattr(sampling, name):
            raise RuntimeInputError(f"{name} {why}: leave it out, or compile without sampling")
    if sampling.logprobs is not None:
        raise RuntimeInputError(f"logprobs {why}: leave it out, or compile without sampling")
    if job.constraint is not None and not guided:
        raise RuntimeInputError("the package takes no mask of tokens: compile with sampling{guided=true}")
    if sampling.temperature and sampling.top_k > top:
        raise RuntimeInputError(f"top_k is {sampling.top_k}, more than the {top} tokens that the package draws from")
    if sampling.presence_penalty and not tells_prompts:
        raise RuntimeInputError(
            "a presence penalty is for tokens of the answer, and a package that reads prompts one by one does not "
            "know them: compile with prefill_seq_len=2 or more"
        )


def together(drawn: Sequence[Drawn | None], places: Sequence[int], rows: int, top: int, vocabulary: int) -> Draw:
    """The settings of a run.

    Args:
        drawn: What each of some rows asks for; `None` for one whose token nobody reads.
        places: These rows.
        rows: Rows of the run; others idle.
        top: Random numbers for each.
        vocabulary: Entries of a mask.
    """
    asked = [(at, one) for at, one in zip(places, drawn, strict=True) if one is not None]

    def of_rows(field: str, idle: float, dtype: type[np.generic] = np.float32) -> Array:
        values = np.full(rows, idle, dtype=dtype)
        for at, one in asked:
            values[at] = getattr(one.sampling, field)
        return values

    numbers = np.full((rows, top), 0.5, dtype=np.float32)
    for at, one in asked:
        numbers[at] = one.numbers(top)
    allowed: Array | None = None
    if any(one.constraint is not None for _, one in asked):
        allowed = np.ones((rows, vocabulary), dtype=np.bool_)
        for at, one in asked:
            if one.constraint is not None:
                allowed[at] = _mask(one.constraint)
    neutral = Sampling()
    return Draw(
        temperature=of_rows("temperature", neutral.temperature),
        top_k=of_rows("top_k", neutral.top_k, np.int32),
        top_p=of_rows("top_p", neutral.top_p),
        min_p=of_rows("min_p", neutral.min_p),
        repetition=of_rows("repetition_penalty", neutral.repetition_penalty),
        presence=of_rows("presence_penalty", neutral.presence_penalty),
        numbers=numbers,
        allowed=allowed,
    )


def _mask(constraint: Any) -> Array:
    allowed = constraint.mask()
    if not allowed.any():
        raise RuntimeInputError("the constraint allows no token: check its grammar and the stop tokens")
    return allowed
