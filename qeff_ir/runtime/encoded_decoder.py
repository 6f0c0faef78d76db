"""Prefill and decode of a decoder whose cross-attention reads what an encoder made of a text or a recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.ports import FEATURES, FEATURES_MASK, LOGITS, Run
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.session import Session

PREFIX = "encoder_"
"""Beginning of the names that the encoder's inputs have in the decoder's graph, where these are the decoder's own."""


class EncodedDecoder(Decoder):
    """A `Decoder` that has an encoder beside it, or in its own graph (AI 100 contract §1.7).

    Args:
        session: The decoder's session.
        encoder: The encoder's; `None` where the decoder's graph has it.

    Raises:
        PackageError: There is no encoder, the decoder reads nothing of it, or see `Decoder`.

    Attributes:
        given: What is encoded for the next `prefill`, by transformers' names of the encoder's inputs, ``[rows, ...]``;
            fewer rows than prompts are repeated, each next to its own copies. Shorter texts than the compiled length
            are padded.
    """

    writes_states = True

    def __init__(self, session: Session, encoder: Session | None) -> None:
        super().__init__(session)
        self._encoder = encoder
        self._crossing = {r.input for r in session.interface.residents if r.update == "once"}
        inputs = (session if encoder is None else encoder).interface.inputs
        self._features = next((port for port in inputs if port.role is FEATURES), None)
        self._masks = [p for s in (session, encoder) if s is not None and (p := s.interface.input(FEATURES_MASK))]
        if self._features is None or (encoder is not None and not self._crossing):
            raise PackageError("the package is not that of an encoder and a decoder: open it with another class")
        sizes = {n: max(s.symbols[n] for s in session.specializations) for n in session.specializations[0].symbols}
        shape = self._features.shape
        self._shape = [size if isinstance(size, int) else sizes[str(size)] for size in shape]
        self._lengths = {str(n): axis for axis, n in enumerate(shape) if axis and isinstance(n, str)}
        self.given: Mapping[str, Array] = {}
        self._whole = np.empty(0)
        self._now = np.empty(0)
        self._seen = np.empty(0, dtype=np.int64)
        self._read: list[list[int]] = []

    @property
    def feature_names(self) -> tuple[str, str]:
        """What transformers calls the encoder's main input, and its mask."""
        assert self._features is not None
        return self._features.name.removeprefix(PREFIX), "attention_mask"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of what is encoded in one row."""
        return tuple(self._shape[1:])

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether features of this shape, ``[rows, ...]``, are encoded as they are, or a text that is padded."""
        own, given = self.shape, tuple(shape[1:])
        return own == given or (self._pads and len(own) == len(given) and all(map(int.__le__, given, own)))

    @property
    def _pads(self) -> bool:
        """Encoders of recordings normalize over the whole length, and their convolutions reach into the padding."""
        assert self._features is not None
        return bool(self._masks) and not np.issubdtype(self._features.dtype, np.floating)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        port = self.session.interface.output(LOGITS)
        size = None if port is None else port.shape[-1]
        assert isinstance(size, int)
        return size

    def prefill(self, rows: Sequence[Sequence[int]], lora_ids: Array | None = None) -> Array:
        """See `Decoder.prefill`; encodes what is `given` first.

        Raises:
            RuntimeInputError: There is nothing to encode, or it does not fit the compiled length; or see `Decoder`.
        """
        self._check(rows)
        with self.turns.join():
            self._whole, self._seen = self._padded(rows)
            logits = super().prefill(rows, lora_ids)
            self._read = [list(row) for row in rows]
            return logits

    def decode(self, tokens: Sequence[int] | Array, lora_ids: Array | None = None) -> Array:
        """See `Decoder.decode`."""
        with self.turns.join():
            logits = super().decode(tokens, lora_ids)
            for row, token in zip(self._read, np.asarray(tokens).reshape(-1).tolist(), strict=True):
                if row:  # others are idle
                    row.append(token)
            return logits

    def beside(self, rows: Sequence[Sequence[int]], given: Mapping[str, Array]) -> Array:
        """Logits of all tokens of other rows; the request that is running goes on behind it.

        The session has one cache, so that the request's own tokens are read again.

        Args:
            rows: See `prefill`.
            given: What is encoded for them.

        Returns:
            Float32 ``[batch, tokens, vocab]``; what is behind the last token of a row means nothing.

        Raises:
            RuntimeInputError: See `prefill`.
        """
        with self.turns.join():
            kept, read = self.given, self._read
            self.given = given
            try:
                found = [self.prefill([row[:1] for row in rows])]
                for at in range(1, max(map(len, rows))):
                    found.append(self.decode([row[at] if at < len(row) else 0 for row in rows]))
            finally:
                self.given = kept
            if kept:
                self.prefill(read)
            return np.stack(found, axis=1)

    def _begin(self) -> None:
        self._now = self._whole
        if self._encoder is None:
            return
        feeds = {port.name: self._whole.astype(port.dtype) for port in self._encoder.interface.inputs}
        feeds |= {port.name: self._seen for port in self._masks if port.name in feeds}
        for name, made in self._encoder.run(feeds).items():
            self.session.write(name, made)

    def _wanted(self, run: Run) -> Run:
        """The first run of a request gets the features; the others get one entry, of which nothing is made."""
        return replace(run, features=self._now, seen=self._seen)

    def _told(self, run: Run) -> Run:
        return replace(run, features=self._whole) if any(run.sizes.get(n, 1) > 1 for n in self._lengths) else run

    def _heard(self, outputs: Mapping[str, Array]) -> None:
        for axis in self._lengths.values():
            self._now = np.take(self._now, [0], axis=axis)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
        """The features of all rows in the compiled length, and which of them are real."""
        assert self._features is not None
        name, mask = self.feature_names
        if name not in self.given:
            raise RuntimeInputError(f"there is nothing to encode: give {name}, as the processor returns it")
        given, shape = np.asarray(self.given[name]), self._shape
        axes = [at for at in range(1, len(shape)) if given.ndim == len(shape) and given.shape[at] != shape[at]]
        if given.ndim != len(shape) or len(axes) > 1:
            raise RuntimeInputError(
                f"{name} is {list(given.shape)}, and the model is compiled for {['batch', *shape[1:]]}: give what the "
                "model's processor returns"
            )
        axis = axes[0] if axes else int(np.argmax(shape[1:])) + 1
        length, most = given.shape[axis], shape[axis]
        if length > most:
            raise RuntimeInputError(
                f"{name} has a length of {length}, and the model is compiled for {most}: compile with a longer "
                "encoder_ctx_len, or give less"
            )
        if length < most and not self._pads:
            raise RuntimeInputError(
                f"{name} has a length of {length}, and the encoder takes just {most}: let the processor pad it, if the "
                "answer for the padded recording is the one that is wanted, or compile for its length"
            )
        seen = np.asarray(self.given.get(mask, np.ones((len(given), length))))
        if self._masks and seen.shape != (len(given), length):
            raise RuntimeInputError(
                f"{mask} is {list(seen.shape)} and {name} {list(given.shape)}: give one number for each entry"
            )
        whole = np.pad(given, [(0, most - length) if at == axis else (0, 0) for at in range(given.ndim)])
        seen = np.pad(seen, [(0, 0), (0, most - length)]) if self._masks else seen
        prompts = max((at for at, row in enumerate(rows, 1) if row), default=0)  # what is behind them is idle
        copies = max(prompts // max(len(given), 1), 1)
        if not max(prompts, 1) <= copies * len(given) <= self.batch_size:
            raise RuntimeInputError(
                f"{name} has {len(given)} rows, and the decoder is given {prompts} prompts in a batch of "
                f"{self.batch_size}: give one row for each prompt, or for each of as many copies"
            )
        idle = self.batch_size - copies * len(given)
        whole, seen = (
            np.pad(np.repeat(a, copies, axis=0), [(0, idle), *[(0, 0)] * (a.ndim - 1)], mode="edge")
            for a in (whole, seen)
        )
        return whole.astype(self._features.dtype), seen.astype(np.int64)
