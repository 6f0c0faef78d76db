"""Who takes part in a race: ours first, then the peers that are wanted, or the reasons why they are missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from transformers import PreTrainedModel

from backends.options import CompileOptions
from benchmarks.peers.compiled import Compiled
from benchmarks.peers.contender import Contender, Entrant, Rows
from benchmarks.peers.eager import Eager
from benchmarks.peers.genai import GenAI
from benchmarks.peers.onnx_export import OnnxExport
from benchmarks.peers.openvino_export import OpenVinoExport
from benchmarks.prepare import prepare
from qeff_ir.ir.module import Module
from qeff_ir.runtime.decoder import Decoder


class Ours:
    """A compiled package, driven by the runtime that users drive it with."""

    name = "qeff-ir, onnxruntime"

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        return np.argmax(self.decoder.prefill(rows), axis=-1).tolist()

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return np.argmax(self.decoder.decode(tokens), axis=-1).tolist()


@dataclass(frozen=True)
class Start:
    """What every contender is given.

    Attributes:
        model: The model, float32, on the CPU.
        module: The same as the frontend makes it; compiling it changes it.
        rows: The prompts.
        ctx_len: Tokens that a fixed cache has room for.
        threads: Threads of each.
        folder: Where to put packages.
    """

    model: PreTrainedModel
    module: Module
    rows: Rows
    ctx_len: int
    threads: int
    folder: Path


@dataclass(frozen=True)
class Peer:
    """Somebody who can be asked to take part.

    Attributes:
        name: Of the row of figures.
        make: Prepares the one who runs; raises whatever it likes.
        needs: The module that it needs beyond what qeff-ir itself needs.
    """

    name: str
    make: Callable[[Start], Contender]
    needs: str | None = None


PEERS = {
    "eager": Peer(Eager.name, lambda start: Eager(start.model)),
    "compiled": Peer(Compiled.name, lambda start: Compiled(start.model, start.ctx_len)),
    "transformers-onnx": Peer(OnnxExport.name, lambda start: OnnxExport(start.model, len(start.rows), start.threads)),
    "openvino": Peer(
        OpenVinoExport.name, lambda start: OpenVinoExport(start.model, len(start.rows), start.threads), "openvino"
    ),
    "genai": Peer(
        GenAI.name, lambda start: GenAI(start.model, start.ctx_len, start.threads, start.folder), "onnxruntime_genai"
    ),
}
"""The peers, by the names that `--peers` takes."""

_CHUNK = 512
"""Prompt tokens that one of our prefill runs takes, at most."""


def contenders(start: Start, peers: str) -> list[Entrant]:
    """Ours, and the peers that are wanted, each ready to run or with the reason why it is missing.

    Args:
        start: What they are given.
        peers: Names with commas, ``all`` or ``none``.

    Raises:
        typer.BadParameter: There is no such peer.
    """
    wanted = list(PEERS) if peers == "all" else [] if peers == "none" else peers.split(",")
    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"there is no peer '{unknown[0]}': it is one of {', '.join(PEERS)}")
    return [Entrant(Ours.name, _ours(start)), *(entrant(PEERS[name], start) for name in wanted)]


def entrant(peer: Peer, start: Start) -> Entrant:
    """Prepare a peer and let it try one step, so that whoever cannot run is found missing before the race.

    Returns:
        The peer, ready, or the first line of what it raised.
    """
    if peer.needs is not None and importlib.util.find_spec(peer.needs) is None:
        return Entrant(peer.name, missing=f"{peer.needs} is not installed")
    try:
        made = peer.make(start)
        made.step(made.prefill(start.rows))
    except Exception as error:  # whatever a compiler, an exporter or a runtime raises; it is reported
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        return Entrant(peer.name, missing=f"{type(error).__name__}: {first[:120]}")
    return Entrant(peer.name, made)


def _ours(start: Start) -> Ours:
    rows = start.rows
    options = CompileOptions(prefill_seq_len=min(_CHUNK, len(rows[0])), ctx_len=start.ctx_len, batch_size=len(rows))
    return Ours(prepare(start.module, options, start.folder, threads=start.threads))
