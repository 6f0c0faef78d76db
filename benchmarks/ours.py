"""Our own rows of a race: a row is a form of weights and edits of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backends.options import CompileOptions
from benchmarks.memory import resident, size_of
from benchmarks.peers.contender import Rows
from benchmarks.prepare import emit, opened
from qeff_ir.arrays import Array
from qeff_ir.ir.module import Module
from qeff_ir.runtime.decoder import Decoder

NAME = "qeff-ir, onnxruntime"

_CHUNK = 512
"""Prompt tokens that one of our prefill runs takes, at most."""


@dataclass(frozen=True)
class Own:
    """A row of ours.

    Attributes:
        title: What stands behind `NAME`; nothing for the stock pipeline.
        edits: Of the stock pipeline, as ``qeff compile --pipeline`` takes them.
    """

    title: str = ""
    edits: str = ""

    @property
    def name(self) -> str:
        """Of the row of figures."""
        return ", ".join(filter(None, (NAME, self.title)))


_ROUNDED = "+quantize-weights{{bits={} block={}}}"
_FAST = ",-ort-matmul-nbits,+ort-matmul-nbits{level=4}<ort-kernels"

OWN: dict[str, tuple[Own, ...]] = {
    "f32": (Own(),),
    "bf16": (),
    "int8": (Own("int8, block 32, fast", _ROUNDED.format(8, 32) + _FAST),),
    "int4": (
        Own("int4, block 32, fast", _ROUNDED.format(4, 32) + _FAST),
        Own("int4, block 128, fast", _ROUNDED.format(4, 128) + _FAST),
        Own("int4, block 128, exact", _ROUNDED.format(4, 128)),
    ),
}
"""Our rows by the form of weights; one whose pipeline cannot be read is missing, with the reason.

Blocks of 128 have a quarter of the scales of the peers, whose blocks are of 32.
"""


class Ours:
    """A compiled package, driven by the runtime that users drive it with."""

    before: int | None = None

    def __init__(self, decoder: Decoder, name: str = NAME) -> None:
        self.decoder = decoder
        self.name = name
        self.needed: int | None = None
        self._last: Array | None = None

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self._last = self.decoder.prefill(rows)
        return np.argmax(self._last, axis=-1).tolist()

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        self._last = self.decoder.decode(tokens)
        return np.argmax(self._last, axis=-1).tolist()

    def logits(self) -> Array:
        """See `benchmarks.faithful.Scores`."""
        assert self._last is not None, "nothing was read yet"
        return self._last


def compiled(own: Own, module: Module, rows: Rows, ctx_len: int, threads: int, folder: Path) -> Ours:
    """A row of ours, ready to run.

    Args:
        own: The row.
        module: As the frontend makes it; it is not changed.
        rows: The prompts.
        ctx_len: Tokens that the caches have room for.
        threads: Threads of the session.
        folder: Where to put the package; it is empty.
    """
    options = CompileOptions(prefill_seq_len=min(_CHUNK, len(rows[0])), ctx_len=ctx_len, batch_size=len(rows))
    module = module.clone()
    emit(module, options, folder, edits=own.edits)
    before = resident()
    made = Ours(opened(folder, threads), own.name)
    made.before, made.needed = before, size_of(folder) + _cache_bytes(module)
    return made


def _cache_bytes(module: Module) -> int:
    """Bytes of all states of an emitted module, which a session keeps in float32."""
    sizes = module.specializations[0].symbols
    shapes = [[sizes[d] if isinstance(d, str) else d for d in state.shape] for state in module.states]
    return sum(4 * int(np.prod(shape)) for shape in shapes)
