"""What earlier jobs left: tokens that slots hold, and snapshots of states that cannot go back."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.runtime.rows import Rows


@dataclass(frozen=True, slots=True)
class Reuse:
    """How a slot gets the first tokens of a prompt.

    Attributes:
        length: How many.
        slot: The slot that holds them, the job's own or another.
        snapshots: Copies that hold them, from the first token on, in place of a slot.
    """

    length: int = 0
    slot: int | None = None
    snapshots: tuple[bytes, ...] = ()


class Prefixes:
    """Finds the longest beginning of a prompt that was computed before, by content: its tokens and its adapter.

    A slot keeps what it holds until another job takes it. Where all states can go back (`Rows.rewindable`), a job may
    use any beginning of it, in whole chunks: the runs that are left are cut as they would be without it, so that their
    numbers are the same to the bit. Elsewhere it may use all that a slot holds, or a snapshot, which is taken every so
    many tokens of a prompt: the entries of these tokens, and all of the other states.

    Args:
        rows: The slots.
        every: Tokens between two snapshots, at least; a multiple of the chunk is taken.
        memory: Bytes that snapshots may take; those that were not used for longest go first.
        enabled: Whether anything is used again.
    """

    def __init__(self, rows: Rows, *, every: int = 256, memory: int = 1 << 28, enabled: bool = True) -> None:
        self._rows, self._memory, self._enabled = rows, memory, enabled
        self._every = -(-max(every, 1) // rows.chunk) * rows.chunk
        self._tokens = np.zeros((rows.slots, rows.ctx_len), dtype=np.int64)
        self._length = [0] * rows.slots
        self._adapter = [0] * rows.slots
        self._used = [0] * rows.slots
        self._clock = 0
        self._snapshots = OrderedDict[bytes, list[Array]]()
        self._bytes = 0

    def place(self, tokens: Array, adapter: int, free: Collection[int]) -> tuple[int, int]:
        """Choose a slot for a prompt, and let it hold as much of the prompt as there is.

        Args:
            tokens: The prompt, int64 ``[tokens]``.
            adapter: Slot of its adapter.
            free: The slots to choose from, at least one.

        Returns:
            The slot, and how many tokens it holds, fewer than the prompt has: logits of the last one are wanted.
        """
        found = self._best(tokens, adapter, free)
        slot = found.slot
        if slot is None or slot not in free:
            slot = min(sorted(free), key=lambda s: (self._length[s] > 0, self._used[s]))
        if found.snapshots:
            for number, digest in enumerate(found.snapshots):
                start = number * self._every
                self._rows.restore(slot, start, start + self._every, self._snapshots[digest])
            for digest in reversed(found.snapshots):  # the first is what all others need: it goes last
                self._snapshots.move_to_end(digest)
        elif found.slot is not None and found.slot != slot:
            self._rows.copy(found.slot, slot, found.length)
        self._tokens[slot, : found.length] = tokens[: found.length]
        self._length[slot], self._adapter[slot] = found.length, adapter
        return slot, found.length

    def hold(self, slot: int, tokens: Sequence[int] | Array, start: int) -> None:
        """Take note of tokens that a run has appended to a slot."""
        end = start + len(tokens)
        self._tokens[slot, start:end] = tokens if end > start + 1 else tokens[0]
        self._length[slot] = end
        self._clock += 1
        self._used[slot] = self._clock

    def held(self, slot: int) -> Array:
        """The tokens that a slot holds, int64 ``[tokens]``."""
        return self._tokens[slot, : self._length[slot]]

    def keep(self, slot: int) -> None:
        """Take a snapshot of a slot, where one is due: its prompt has just come to such a length."""
        length = self._length[slot]
        if self._rows.rewindable or not self._rows.on_host or not self._enabled or length % self._every:
            return
        chain = list(self._chain(self._tokens[slot, :length], self._adapter[slot]))
        if not chain or chain[-1] in self._snapshots or any(d not in self._snapshots for d in chain[:-1]):
            return
        saved = self._rows.save(slot, length - self._every, length)
        self._snapshots[chain[-1]] = saved
        self._bytes += _bytes(saved)
        while self._bytes > self._memory:
            self._bytes -= _bytes(self._snapshots.popitem(last=False)[1])

    def drop(self, slot: int) -> None:
        """A slot holds nothing that can be used: a run over it has failed."""
        self._length[slot] = 0

    def forget(self, adapter: int | None = None) -> None:
        """Use nothing again that was computed with an adapter, or nothing at all.

        What a job that runs holds stays its own; it is forgotten for others. Snapshots all go.
        """
        for slot in range(self._rows.slots):
            if adapter is None or self._adapter[slot] == adapter:
                self._adapter[slot] = -1
        self._snapshots.clear()
        self._bytes = 0

    def _best(self, tokens: Array, adapter: int, free: Collection[int]) -> Reuse:
        best = Reuse()
        if not self._enabled:
            return best
        most = len(tokens) - 1
        for slot in sorted(range(self._rows.slots), key=lambda s: s not in free):  # the job's own slot needs no copy
            held = self._length[slot]
            if self._adapter[slot] != adapter or not held:
                continue
            length = _common(self._tokens[slot, :held], tokens[:most])
            if self._rows.rewindable:
                length -= length % self._rows.chunk
            elif length < held or slot not in free:
                continue
            if length > best.length and (slot in free or self._rows.on_host):
                best = Reuse(length, slot)
        known = list[bytes]()
        for digest in self._chain(tokens[:most], adapter) if self._snapshots else ():
            if digest not in self._snapshots:
                break
            known.append(digest)
        if len(known) * self._every > best.length:
            return Reuse(len(known) * self._every, None, tuple(known))
        return best

    def _chain(self, tokens: Array, adapter: int) -> Iterator[bytes]:
        """A digest of each beginning whose length is a multiple of what is between two snapshots."""
        digest = str(adapter).encode()
        for start in range(0, len(tokens) - self._every + 1, self._every):
            block = np.ascontiguousarray(tokens[start : start + self._every], dtype=np.int64)
            digest = hashlib.blake2b(digest + block.tobytes(), digest_size=16).digest()
            yield digest


def _common(one: Array, other: Array) -> int:
    """How many of their first tokens are equal."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size


def _bytes(saved: Sequence[Array]) -> int:
    return sum(array.nbytes for array in saved)
