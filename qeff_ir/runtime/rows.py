"""Runs over rows of the caches: which row of a run continues which slot, and what the slots hold in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.ports import ADAPTER_ROW, CACHE_ROW, CACHE_ROWS, KEPT_LOGITS, NEXT_TOKENS, Run
from qeff_ir.ir.residents import KINDS, Resident
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.drawing_decoder import DrawingDecoder
from qeff_ir.runtime.drawn import Drawn, together
from qeff_ir.runtime.interface import BATCH, LENGTH
from qeff_ir.runtime.runs import fitted, last
from qeff_ir.runtime.session import HostStates, Session
from qeff_ir.runtime.token_table import TokenTable


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens that a run appends to a slot.

    Attributes:
        slot: Row of the caches.
        tokens: Token ids, as many as a run takes at most.
        start: Position of the first.
        adapter: Slot of the adapter; 0 is the base model.
        reads: Whether the tokens are of a prompt.
        drawn: How the next token is drawn, where the graph draws and somebody reads it.
    """

    slot: int
    tokens: Sequence[int] | Array
    start: int
    adapter: int = 0
    reads: bool = False
    drawn: Drawn | None = None


class Rows:
    """The slots of a session.

    Where the graph takes the row of the caches that each row of a run continues (`CACHE_ROW`), any rows of a run may
    continue any slots; elsewhere row and slot are one, and the others idle. Where the graph itself selects rows, an
    idle one has a slot of its own all the same: what is written back for it must not meet what another row writes.
    Nothing that a slot held before is seen by a run whose first position is 0.

    Args:
        session: The session, for this object alone.
        table: Where to look up the tokens of a session that takes vectors.

    Raises:
        PackageError: The package is not that of a causal LM, or its runs have more rows than its caches.
        RuntimeInputError: The package returns features of an embedding.

    Attributes:
        slots: Rows of the caches.
        width: Rows of the widest decode run, so many slots may be in use at once.
        chunk: Tokens that a prefill run takes of a row.
        chunk_rows: Rows of a prefill run.
        ctx_len: Positions that a slot has room for.
        vocabulary: Tokens that there are logits of.
        drafts: Tokens of the longest draft that a run verifies.
        adapters: Slots of adapters beside the base model's.
        rewindable: Whether a slot may go on from any position that it has been at.
        on_host: Whether what slots hold can be read and changed.
        draws: Whether the graph draws the next tokens.
        top: Tokens that it draws from at most.
        guided: Whether it takes a mask of tokens.
    """

    def __init__(self, session: Session, table: TokenTable | None = None) -> None:
        self.draws = session.interface.output(NEXT_TOKENS) is not None
        # What it refuses, and the sizes that it reads.
        decoder = DrawingDecoder(session, table) if self.draws else Decoder(session, table)
        if not self.draws:
            decoder.check_scores()
        self.top, self.guided = (decoder.top, decoder.guided) if isinstance(decoder, DrawingDecoder) else (0, False)
        interface, sizes = session.interface, session.specializations[0].symbols
        self._session, self._inputs = session, interface.inputs
        self._states = [r for r in interface.residents if r.retained and not r.written_by_host]
        returned = interface.output(decoder.returns)
        assert returned is not None
        self._returned = returned.name
        self._embed = None if table is None else table.vectors
        self._shapes = sorted({(s.symbols[LENGTH], s.symbols[BATCH]) for s in session.specializations})
        self._any_row = interface.input(CACHE_ROW) is not None
        selects = any(r.shape[0] != BATCH for r in self._states)  # the graph itself, not the session
        self._fills = self._any_row and selects
        rows = [_size(r.shape[0], sizes) for r in self._states] or [self._shapes[0][1]]
        self.slots = sizes[CACHE_ROWS] if self._any_row and not selects else min(rows)
        self.width = min(self.slots, max(batch for _, batch in self._shapes))
        self.chunk = max(length for length, _ in self._shapes)
        self.chunk_rows = min(self.slots, max(batch for length, batch in self._shapes if length == self.chunk))
        self.ctx_len = decoder.ctx_len
        own = decoder.vocabulary if isinstance(decoder, DrawingDecoder) else returned.shape[-1]
        self.vocabulary = _size(own, sizes)
        kept = interface.input(KEPT_LOGITS)
        if kept is not None and self.draws:
            raise PackageError(
                "the package draws the tokens behind drafts, which an engine cannot verify: compile without "
                "num_speculative_tokens, or without sampling"
            )
        self.drafts = max(_size(kept.shape[0] or 1, s.symbols) for s in session.specializations) - 1 if kept else 0
        self.adapters = max((r.slots for r in interface.residents), default=0)
        if interface.input(ADAPTER_ROW) is None:
            self.adapters = 0
        self.rewindable = all(r.rewindable for r in self._states)
        self._host = session if isinstance(session, HostStates) else None
        self.on_host = self._host is not None
        if max(batch for _, batch in self._shapes) > self.slots:
            raise PackageError(
                f"a run of the package has more rows than its caches, which have {self.slots}: compile again"
            )

    def run(self, pieces: Sequence[Piece]) -> Array:
        """Append a piece to each of some slots.

        Args:
            pieces: At most `width` pieces of one token, or `chunk_rows` of at most `chunk`; of different slots.

        Returns:
            The logits of each piece's last token, float32 ``[pieces, vocab]``; the next token where the graph draws it,
            int64 ``[pieces, 1]``.

        Raises:
            QeffError: No compiled shapes take the run, or it fails.
        """
        return self.verify(pieces, 1)[:, 0]

    def verify(self, pieces: Sequence[Piece], keep: int) -> Array:
        """Append a piece to each of some slots, for the logits of several tokens.

        Args:
            pieces: At most `width` pieces of at most `keep` tokens, or see `run`.
            keep: One token, and those of the longest draft.

        Returns:
            The logits of each piece's last tokens, float32 ``[pieces, keep, vocab]``, the last of them at the end.
            Those before the first token mean nothing.

        Raises:
            QeffError: No compiled shapes take the run, or it fails.
        """
        columns = max(len(piece.tokens) for piece in pieces)
        if self.draws and any(piece.reads for piece in pieces):
            columns = max(columns, min(2, self.chunk))  # a run of one token would be one of an answer
        batch = self._batch(columns, len(pieces))
        taken = [piece.slot for piece in pieces]
        at = range(len(pieces)) if self._any_row else taken
        tokens = np.zeros((batch, columns), dtype=np.int64)
        positions = np.full((batch, columns), -1, dtype=np.int64)
        adapters = np.zeros(batch, dtype=np.int64)
        for row, piece in zip(at, pieces, strict=True):
            length = len(piece.tokens)
            tokens[row, :length] = piece.tokens
            positions[row, :length] = np.arange(piece.start, piece.start + length)
            adapters[row] = piece.adapter
        run = Run(tokens, positions, adapters, self._cache_rows(taken, batch), embed=self._embed, keep=keep)
        if self.draws:
            drawn = [piece.drawn for piece in pieces]
            run = replace(run, draw=together(drawn, at, batch, self.top, self.vocabulary))
        run = fitted(run, self._inputs, self._session.specializations)
        outputs = self._session.run({port.name: port.feed(run) for port in self._inputs})
        found = last(outputs[self._returned], run)
        return found[: len(pieces)] if self._any_row else found[taken]

    def copy(self, source: int, slot: int, length: int) -> None:
        """Let a slot hold the first tokens of another; of states that can be rewound, in a session of the host."""
        assert self._host is not None
        for state in self._states:
            rows = self._host.state(state.input)
            where = _entries(state, 0, length)
            rows[slot][where] = rows[source][where]

    def save(self, slot: int, start: int, end: int) -> list[Array]:
        """Copies of what a slot holds of tokens, at whose end it is: their entries, and all of other states."""
        assert self._host is not None
        return [self._host.state(s.input)[slot][_entries(s, start, end)].copy() for s in self._states]

    def restore(self, slot: int, start: int, end: int, saved: Sequence[Array]) -> None:
        """Put back what `save` has copied, of a range behind what the slot holds."""
        assert self._host is not None
        for state, entries in zip(self._states, saved, strict=True):
            self._host.state(state.input)[slot][_entries(state, start, end)] = entries

    def _cache_rows(self, taken: Sequence[int], batch: int) -> Array:
        """The slot of each row of a run, int64 ``[batch]``; a row that idles has another, or -1, which is none."""
        if not self._any_row:
            return np.arange(batch)
        spare = [slot for slot in range(self.slots) if slot not in taken] if self._fills else [-1] * batch
        return np.array([*taken, *spare][:batch], dtype=np.int64)

    def _batch(self, columns: int, rows: int) -> int:
        """Rows of the smallest compiled shape that takes a run."""
        found = next((b for n, b in self._shapes if n >= columns and b >= rows), None)
        if found is None:
            raise RuntimeInputError(f"no compiled shapes take a run of {rows} rows and {columns} tokens")
        return found


def _entries(state: Resident, start: int, end: int) -> tuple[slice, ...]:
    """Where a row of a state has the entries of tokens; all of it, where it has none or uses them in turn."""
    axis = KINDS[state.kind].context_axis
    if axis is None or state.ring:
        return ()
    return (*[slice(None)] * (axis - 1), slice(start, end))


def _size(dim: int | str | None, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes[str(dim)]
