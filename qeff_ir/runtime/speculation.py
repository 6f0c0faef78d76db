"""Drafts: tokens that may follow, which one run verifies together, instead of a run for each.

A job chooses each token of the logits that it would have had without a draft; a draft is accepted as far as it says the
same. So an answer is token for token the one without drafts, sampled ones of one seed too: a drafted token is accepted
with the probability that the model gives it, and where it is not, what is chosen is distributed as the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.runtime.rows import Piece, Rows
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.token_table import TokenTable


class Drafter(Protocol):
    """Guesses what follows."""

    def draft(self, tokens: Sequence[int] | Array, most: int, slot: int = 0) -> Sequence[int]:
        """Tokens that may follow.

        Args:
            tokens: All tokens of a request so far, at least one.
            most: How many may be returned; fewer, and none, are fine.
            slot: The slot of the request; requests of one slot come one after the other.
        """
        ...


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """Drafts what has followed the last tokens before, where they stand in the request already.

    Attributes:
        longest: Tokens to look for at first; then fewer, down to one.
    """

    longest: int = 3

    def draft(self, tokens: Sequence[int] | Array, most: int, slot: int = 0) -> list[int]:
        """See `Drafter.draft`; of several places, the last one tells."""
        known = np.asarray(tokens, dtype=np.int64)
        for size in range(min(self.longest, len(known) - 1), 0, -1):
            places = np.flatnonzero((sliding_window_view(known[:-1], size) == known[-size:]).all(axis=1))
            if len(places):
                start = int(places[-1]) + size
                return known[start : start + most].tolist()
        return []


class DraftModel:
    """Drafts what a smaller model of the same vocabulary says, its best token each time.

    What it holds of a request stays in its own caches; after a rejected draft, it goes back by position.

    Args:
        session: Of the smaller model, for this object alone.
        table: Where to look up the tokens of a session that takes vectors.

    Raises:
        PackageError: Its states cannot go back behind a rejected draft, or see `Rows`.
    """

    def __init__(self, session: Session, table: TokenTable | None = None) -> None:
        self._rows = Rows(session, table)
        stuck = next((r.input for r in session.interface.residents if r.update in ("slide", "replace")), None)
        if stuck is not None:
            raise PackageError(f"{stuck} cannot go back behind a rejected draft: take another model for drafts")
        self._held: dict[int, list[int]] = {}

    def draft(self, tokens: Sequence[int] | Array, most: int, slot: int = 0) -> list[int]:
        """See `Drafter.draft`.

        Raises:
            RuntimeInputError: The model has no such slot.
        """
        rows, wanted = self._rows, np.asarray(tokens, dtype=np.int64).tolist()
        if slot >= rows.slots:
            raise RuntimeInputError(f"the model for drafts has {rows.slots} slots: compile it for as many requests")
        most = min(most, rows.ctx_len - len(wanted) + 1)
        if most < 1 or max(wanted) >= rows.vocabulary:
            return []
        held = self._held.pop(slot, [])
        same = min(_common(held, wanted), len(wanted) - 1)
        if len(held) - same > rows.chunk and not rows.rewindable:  # a ring has room for so many tokens to be taken back
            same = 0  # and a run from position 0 forgets what there was
        logits = np.empty(0)
        for start in range(same, len(wanted), rows.chunk):
            logits = rows.run([Piece(slot, wanted[start : start + rows.chunk], start)])
        drafted = [int(logits[0].argmax())]
        while len(drafted) < most:
            logits = rows.run([Piece(slot, drafted[-1:], len(wanted) + len(drafted) - 1)])
            drafted.append(int(logits[0].argmax()))
        self._held[slot] = wanted + drafted[:-1]
        return drafted


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first tokens are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
