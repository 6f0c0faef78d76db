"""Whoever takes part in a race: reads prompts, then continues greedily, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

Rows = list[list[int]]


class Contender(Protocol):
    """One way to run the model."""

    name: str

    def prefill(self, rows: Rows) -> list[int]:
        """Forget everything, read the prompts (all of one length), return each row's next token."""
        ...

    def step(self, tokens: list[int]) -> list[int]:
        """Append one token to every row, return each row's next token."""
        ...


@dataclass(frozen=True)
class Entrant:
    """Somebody who takes part, or would: with a reason why not, which the figures report.

    Attributes:
        name: Who.
        contender: The one who runs; `None` when missing.
        missing: Why it does not run here.
    """

    name: str
    contender: Contender | None = None
    missing: str | None = None
