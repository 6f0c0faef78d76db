"""Whoever takes part in a race: reads prompts, then continues greedily, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Rows = list[list[int]]


class Contender(Protocol):
    """One way to run the model.

    Attributes:
        name: Of the row of figures.
        before: Resident bytes of the process just before the session was opened; `None` of one that runs the model that
            all others were made of.
    """

    name: str
    before: int | None

    def prefill(self, rows: Rows) -> list[int]:
        """Forget everything, read the prompts (all of one length), return each row's next token."""
        ...

    def step(self, tokens: list[int]) -> list[int]:
        """Append one token to every row, return each row's next token."""
        ...


@runtime_checkable
class RunsAhead(Protocol):
    """A contender that goes on by itself while its last token is looked at."""

    def finish(self) -> None:
        """Stop: it is the turn of another."""
        ...


@dataclass(frozen=True)
class Entrant:
    """Somebody who takes part, or would: with a reason why not, which the figures report.

    Attributes:
        name: Who.
        contender: The one who runs; `None` when missing.
        missing: Why it does not run here.
        weights: The form of its weights, one of `WEIGHTS`.
        memory: Bytes that its session takes; `None` where they were not measured.
        needed: Bytes of its weights, scales and caches; `None` where nobody counts them.
    """

    name: str
    contender: Contender | None = None
    missing: str | None = None
    weights: str = "f32"
    memory: int | None = None
    needed: int | None = None


WEIGHTS = ("f32", "bf16", "int8", "int4")
"""Forms of weights, by the names that `--weights` takes."""


def titled(name: str, weights: str) -> str:
    """The name of a row; float32, which all suites have, is not said."""
    return name if weights == "f32" else f"{name}, {weights}"
