"""Prefill and decode of a language model that is given rows of an encoder in the place of some tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.ports import AXES, NEXT_ROW, PICTURE_TOKENS, PICTURES_TOKENS, PREFIX_TOKENS, Role, Run
from qeff_ir.ir.residents import Resident
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.picture_forms import PictureForms
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.token_table import TokenTable


@dataclass(frozen=True)
class Pictured:
    """What a prompt has beside its tokens.

    Attributes:
        rows: By the name of the resident, float32 ``[rows, hidden]`` (``[layers, rows, hidden]`` where they are for
            layers): one for each placeholder, in order; where the graph has the encoder, all pixels of the prompt, as
            the processor returns them. Empty for a prompt of text alone.
        planes: Place of each token on three axes, int64 ``[3, tokens]``; its position on each by default.
        types: As the model's processor returns them, int64 ``[tokens]``; 0, which is text, by default.
    """

    rows: Mapping[str, Array] = field(default_factory=dict[str, Array])
    planes: Array | None = None
    types: Array | None = None


class PictureDecoder(Decoder):
    """A `Decoder` whose prompts may have pictures.

    Args:
        session: The session.
        forms: The pictures that the encoder in the session's graph takes; `None` where it is not there.
        table: See `Decoder`.

    Raises:
        PackageError: The session keeps no rows, or pixels of other pictures, or see `Decoder`.

    Attributes:
        capacity: Rows that the context of each prompt may hold.
        whole: Role of the types, where tokens that see one another must lie in one prefill run.
        prompts: What the prompts of the next `prefill`, which takes it, have beside tokens; fewer than the batch are
            repeated, each next to its own copies. Text alone by default.
    """

    writes_states = True

    def __init__(self, session: Session, forms: PictureForms | None = None, table: TokenTable | None = None) -> None:
        super().__init__(session, table)
        self._residents = {r.input: r for r in session.interface.residents if r.update == "host" and r.shared}
        if not self._residents:
            raise PackageError("the package keeps no rows of an encoder: open it as a causal LM")
        self._pixels = None if forms is None else forms.sizes[0].pixels[1]
        if forms is None:
            sizes = {state.shape[-2] for state in self._residents.values()}
            self.capacity = max(size for size in sizes if isinstance(size, int))
        else:
            forms.check_batch([self._sizes(state) for state in self._residents.values()], self.batch_size)
            self.capacity = forms.count * forms.sizes[0].rows
        self.whole = next((role for role in _BLOCKS if session.interface.input(role) is not None), None)
        self.prompts: Sequence[Pictured] = ()
        self._rows: list[Pictured] = [Pictured()] * self.batch_size
        self._asked = self._rows
        self._first = np.zeros((self.batch_size, 1), dtype=np.int64)
        port = session.interface.output(NEXT_ROW)
        self._next = None if port is None else port.name

    def prefill(self, rows: Sequence[Sequence[int]], lora_ids: Array | None = None) -> Array:
        """See `Decoder.prefill`; writes the rows of `prompts` first.

        Raises:
            RuntimeInputError: A picture is longer than a prefill run, where it must lie in one, a prompt has more rows
                than fit or types of other tokens, or see `Decoder`. The request before can go on.
        """
        with self.turns.join():
            given, self.prompts = (list(self.prompts) or [Pictured()], ())
            copies, left = divmod(self.batch_size, len(given))
            if left:
                raise RuntimeInputError(
                    f"there are {len(given)} prompts with pictures for a batch of {self.batch_size}: give one for each"
                )
            self._asked = [prompt for prompt in given for _ in range(copies)]
            logits = super().prefill(rows, lora_ids)
            self._first = np.full((self.batch_size, 1), self.capacity + 1)  # a placeholder that is generated is a token
        return logits

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        super()._check(rows)
        for tokens, prompt in zip(rows, self._asked, strict=True):
            if prompt.types is not None and prompt.types.shape != (len(tokens),):
                raise RuntimeInputError(
                    f"the types are {list(prompt.types.shape)} for a prompt of {len(tokens)} tokens: give one for each"
                )
            for name, given in prompt.rows.items():
                if self._pixels is None and given.shape[-2] > self.capacity:
                    raise RuntimeInputError(
                        f"{name} has {given.shape[-2]} rows, and a prompt may have {self.capacity}: give fewer pictures"
                    )

    def _begin(self) -> None:
        self._rows = self._asked
        for name, state in self._residents.items():
            self.session.write(name, self._written(name, self._sizes(state)))
        # Beside words alone, a placeholder is a token, and so is one for what stands beside pictures.
        self._first = np.array([[0 if prompt.rows else self.capacity + 1] for prompt in self._rows], dtype=np.int64)

    def _sizes(self, state: Resident) -> list[int]:
        return [self.batch_size if isinstance(size, str) else size for size in state.shape]

    def _written(self, name: str, shape: Sequence[int]) -> Array:
        """The rows, or pixels, of all prompts as a resident holds them; zeros behind those that there are."""
        held = np.zeros(shape, dtype=np.float32)
        axis = len(shape) - 3 if self._pixels is None else self._pixels.row_axis
        own = shape[axis] // self.batch_size
        for index, prompt in enumerate(self._rows):
            given = prompt.rows.get(name)
            if given is not None:
                whole = np.expand_dims(given, axis) if self._pixels is None else given
                place = [slice(size) for size in whole.shape]
                place[axis] = slice(index * own, index * own + whole.shape[axis])
                held[tuple(place)] = whole
        return held

    def _cut(self, row: int, length: int) -> list[tuple[int, int]]:
        if self.whole is None:
            return super()._cut(row, length)
        types = self._asked[row].types
        said, blocks = _BLOCKS[self.whole]
        pieces: list[tuple[int, int]] = []
        start = 0
        for first, end in [*blocks(np.zeros(length) if types is None else types), (length, length)]:
            if end - first > self.prefill_len:
                raise RuntimeInputError(
                    f"{said} takes {end - first} tokens, which must lie in one prefill run, and those have "
                    f"{self.prefill_len}: compile with prefill_seq_len={end - first} or more"
                )
            while end - start > self.prefill_len:  # as much as fits, but nothing of the picture
                cut = min(start + self.prefill_len, first)
                pieces.append((start, cut))
                start = cut
        return [*pieces, (start, length)] if length > start else pieces

    def _told(self, run: Run) -> Run:
        planes, types = np.zeros((AXES, *run.tokens.shape), dtype=np.int64), np.zeros_like(run.tokens)
        for index, prompt in enumerate(self._rows):
            at = run.positions[index]
            planes[:, index] = np.maximum(at, 0) if prompt.planes is None else _places(prompt.planes, at)
            if prompt.types is not None:
                inside = (at >= 0) & (at < len(prompt.types))
                types[index, inside] = prompt.types[at[inside]]
        return replace(run, first_rows=self._first, planes=planes, types=types)

    def _heard(self, outputs: Mapping[str, Array]) -> None:
        if self._next is not None:
            self._first = outputs[self._next]


def _places(planes: Array, positions: Array) -> Array:
    """Places of tokens by their positions, ``[3, seq]``: those of new tokens go on from the last one's."""
    known = planes[:, np.clip(positions, 0, planes.shape[1] - 1)]
    return known + np.maximum(positions - planes.shape[1] + 1, 0)


def _pictures(types: Array) -> list[tuple[int, int]]:
    """Where each run of tokens that are no text begins and ends."""
    marked = np.concatenate([[0], (types != 0).astype(np.int64), [0]])
    edges = np.flatnonzero(np.diff(marked))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _around(marked: Array) -> list[tuple[int, int]]:
    """From the first token that is marked to the last."""
    at = np.flatnonzero(marked)
    return [(int(at[0]), int(at[-1]) + 1)] if len(at) else []


_BLOCKS: dict[Role, tuple[str, Callable[[Array], list[tuple[int, int]]]]] = {
    PICTURE_TOKENS: ("a picture", _pictures),
    PICTURES_TOKENS: ("what lies from the first picture to the last", lambda types: _around(types != 0)),
    PREFIX_TOKENS: ("the prompt", lambda types: _around(types == 0)),
}
"""What must lie in one run by the role of the types, and where it begins and ends."""
