"""What is asked of an engine, and what comes out: jobs, tickets and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, Protocol

from qeff_ir.arrays import Array
from qeff_ir.errors import QeffError, RuntimeInputError

Finish = Literal["stop", "length", "cancelled"]
"""Why a job ends: with a stop token, with as many tokens as it may have, or because it was taken back."""


class EngineFullError(QeffError):
    """As many jobs wait as may wait: ask again later."""


class EngineClosedError(QeffError):
    """The engine takes no jobs anymore, or was closed while a job ran."""


class Constraint(Protocol):
    """What the next token of one job may be: a grammar, a schema.

    An engine calls it between two runs, with the lock of no other job held; a `QeffError` fails this job alone.
    """

    def mask(self) -> Array:
        """The tokens that may come next, bool ``[vocab]``, at least one."""
        ...

    def advance(self, token: int) -> None:
        """Take note of the token that was chosen."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens of one job are chosen.

    The order is transformers': repetition penalty (of prompt and answer), presence and frequency penalties (of the
    answer), bias, the constraint's mask, temperature, top k, top p, min p. Log probabilities are of the softmax of the
    model's own logits, before all that.

    Attributes:
        temperature: Logits are divided by it; 0 is greedy.
        top_k: Only so many of the best tokens; 0 is all.
        top_p: Only the fewest best tokens whose probabilities add up to it.
        min_p: Only tokens that are at least so probable as this share of the best one's.
        repetition_penalty: Positive logits of tokens that there were are divided by it, others multiplied.
        presence_penalty: Taken from logits of tokens of the answer.
        frequency_penalty: The same, times how often each was there.
        seed: Of the random numbers; answers with one repeat. Each job draws another by default.
        bias: Added to the logits of some tokens.
        logprobs: How many of the most probable tokens to tell; `None` for no log probabilities at all.

    Raises:
        RuntimeInputError: A number is outside of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict[int, float])
    logprobs: int | None = None

    def __post_init__(self) -> None:
        least = {"temperature": 0.0, "top_k": 0, "min_p": 0.0, "logprobs": 0, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise RuntimeInputError(f"{name} is {value}: give at least {bound}")
        if not 0 < self.top_p <= 1 or not self.min_p <= 1:
            name = "min_p" if 0 < self.top_p <= 1 else "top_p"
            raise RuntimeInputError(f"{name} is {getattr(self, name)}: give a share of at most 1")
        if not self.repetition_penalty > 0:
            raise RuntimeInputError(f"repetition_penalty is {self.repetition_penalty}: give more than 0")
        numbers = [self.temperature, self.repetition_penalty, self.presence_penalty, self.frequency_penalty]
        if not all(map(math.isfinite, [*numbers, *self.bias.values()])):
            raise RuntimeInputError("a setting of the sampling is no finite number: give another")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Job:
    """One request.

    Attributes:
        tokens: The prompt, at least one token.
        max_new_tokens: How many tokens come at most, a stop token included. With the prompt, one more than the context
            fits: the last token is only read out.
        stop_tokens: Each ends the answer, and is its last token.
        sampling: How tokens are chosen.
        adapter: Slot of its adapter; 0 is the base model.
        constraint: What each token may be; it belongs to this job.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY
    adapter: int = 0
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token of an answer.

    Attributes:
        token: Its id.
        finish: Why it is the last one; `None` for all others.
        logprob: Its log probability, where `Sampling.logprobs` is set.
        alternatives: The most probable tokens with their log probabilities, the best first.
    """

    token: int
    finish: Literal["stop", "length"] | None = None
    logprob: float | None = None
    alternatives: Sequence[tuple[int, float]] = ()


Listener = Callable[[Emitted | None], None]
"""Told of each token by the thread that drives the session, so it has to be quick and must not raise.

The last call has an `Emitted.finish`, or `None` for a job that ends without another token: cancelled, or failed.
"""


class Ticket:
    """A job that was taken. Any thread may iterate it, once, for the tokens as they come::

        for emitted in engine.submit(job):
            print(emitted.token)

    Iterating raises the error of a job that fails, behind the tokens that it had; it just ends for one that is
    cancelled.

    Args:
        job: The job.
        listener: Who is told of tokens; then there is nothing to iterate.

    Attributes:
        job: The job.
        cached: Tokens of the prompt that were not computed anew, from its first run on.
        finish: Why it has ended; `None` before, and for one that has failed.
        error: Why it has failed.
        cancelled: Whether it was taken back.
    """

    def __init__(self, job: Job, listener: Listener | None = None) -> None:
        self.job = job
        self.cached = 0
        self.finish: Finish | None = None
        self.error: QeffError | None = None
        self.cancelled = False
        self._listener = listener
        self._tokens = SimpleQueue[Emitted | None]()
        self._ended = False

    def __iter__(self) -> Iterator[Emitted]:
        """The tokens as they come; it waits for each.

        Raises:
            QeffError: The job fails.
        """
        while (emitted := self._tokens.get()) is not None:
            yield emitted
            if emitted.finish is not None:
                return
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Take the job back: no token comes anymore, and its slot is free before the next run but one."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Whether no token will come anymore."""
        return self._ended

    def tell(self, emitted: Emitted) -> None:
        """Hand on a token; for who drives the session."""
        if emitted.finish is not None:
            self.finish, self._ended = emitted.finish, True
        self._put(emitted)

    def end(self, error: QeffError | None = None) -> None:
        """End without another token: failed, or cancelled; for who drives the session."""
        if self._ended:
            return
        self.error, self.finish, self._ended = error, None if error is not None else "cancelled", True
        self._put(None)

    def _put(self, emitted: Emitted | None) -> None:
        if self._listener is not None:
            self._listener(emitted)
        else:
            self._tokens.put(emitted)
