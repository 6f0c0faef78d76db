"""Embeddings of many texts: sorted by length, in batches, in the order they were given."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir.ports import MASK, TOKENS, name_of
from qeff_ir.runtime.encoder import Encoder
from qeff_ir.runtime.texts import tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 32
"""Texts of a run where any number can be; that of sentence-transformers."""
_TOKENIZING = threading.Lock()
"""A tokenizer keeps in itself where it truncates, and several models may share one."""


def encode(
    encoder: Encoder,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | None = None,
    truncate: bool = False,
    prompt: str = "",
    max_length: int | None = None,
    show_progress: bool | None = None,
) -> Array:
    """One embedding of each text.

    Args:
        encoder: Of a model with a pooling.
        texts: Any number.
        tokenizer: The model's.
        batch_size: Texts of a run; by default 32 where any number runs, else what the model is compiled for.
        truncate: Whether a text that is too long is cut.
        prompt: What every text starts with.
        max_length: Tokens of a text that the model reads, where it says so.
        show_progress: Whether to show a progress bar; by default when it takes over two seconds, in a terminal.

    Returns:
        float32 ``[texts, features]``.

    Raises:
        RuntimeInputError: A text has no token, is too long or no text, or the model returns no embedding.
    """
    output = encoder.interface.outputs[0]
    if not encoder.pools:
        raise RuntimeInputError("the model returns no embedding: open it with a pooling, and compile it again")
    size = batch_size if batch_size is not None else _BATCH if encoder.session.free else encoder.batch_size
    if type(size) is not int or size < 1:
        raise RuntimeInputError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    for what, text in [("prompt", prompt), *((f"text {index}", text) for index, text in enumerate(texts))]:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RuntimeInputError(f"{what} is a {type(text).__name__}: give texts")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RuntimeInputError(f"{what} has half a character (a lone surrogate): decode it as UTF-8 first")
    rows = _tokens(encoder, [prompt + text for text in texts], tokenizer, truncate, max_length)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    width = output.shape[-1]
    result = np.empty((len(rows), width if isinstance(width, int) else 0), dtype=np.float32)
    with _Progress(len(rows), show_progress) as progress:
        for chosen in _batches(order, rows, size, alike=not encoder.pads):
            result[chosen] = encoder.run(_batch([rows[i] for i in chosen], encoder))["output"]
            progress.advance(len(chosen))
    return result


def _tokens(
    encoder: Encoder,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    truncate: bool,
    max_length: int | None,
) -> list[list[int]]:
    """Token ids of each text, special tokens included."""
    if not texts:
        return []
    limit = min((n for n in (encoder.longest, max_length) if n is not None), default=None)
    settings: dict[str, Any] = {"truncation": True, "max_length": limit} if truncate else {"verbose": False}
    with _TOKENIZING, tokenizing("the texts"):
        made: Any = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, **settings)
        rows: list[list[int]] = made["input_ids"]
    for index, row in enumerate(rows):
        if not row:
            raise RuntimeInputError(f"text {index} ({texts[index]!r}) has no token: give some text")
        if max_length is not None and len(row) > max_length == limit:
            raise RuntimeInputError(
                f"text {index} has {len(row)} tokens, the model reads {limit} of a text: shorten it, or pass "
                "truncate=True"
            )
        if limit is not None and len(row) > limit:
            raise RuntimeInputError(
                f"text {index} has {len(row)} tokens, the model is compiled for {limit}: compile with "
                f"seq_len={len(row)} or more, or pass truncate=True"
            )
    return rows


def _batches(order: list[int], rows: list[list[int]], size: int, *, alike: bool) -> Iterator[list[int]]:
    """Texts that run together, at most `size`; `alike`: of one length each, where padding would count."""
    start = 0
    while start < len(order):
        end = min(start + size, len(order))
        while alike and len(rows[order[end - 1]]) != len(rows[order[start]]):
            end -= 1
        yield order[start:end]
        start = end


def _batch(rows: list[list[int]], encoder: Encoder) -> dict[str, Array]:
    """Rows of tokens as inputs, padded on the right."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), encoder.fill, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    marks = encoder.interface.input(MASK)
    tokens = encoder.interface.input(TOKENS)
    return {name_of(TOKENS) if tokens is None else tokens.name: ids} | ({} if marks is None else {marks.name: mask})


class _Progress:
    """A progress bar over texts that appears after two seconds, or at once, or never."""

    def __init__(self, total: int, show: bool | None) -> None:
        import time

        self._total, self._done, self._bar, self._task = total, 0, None, None
        quiet = show is False or (show is None and not sys.stderr.isatty())
        self._due = float("inf") if quiet else time.monotonic() + (0.0 if show else 2.0)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Tell that so many more texts are done."""
        import time

        self._done += count
        if self._bar is None and time.monotonic() >= self._due:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._task = self._bar.add_task("Embedding", total=self._total)
            self._bar.start()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
