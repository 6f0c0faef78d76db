"""Who takes part in a race: this project, and the peers that are wanted and run here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import typer
from transformers import PreTrainedModel

from backends.base import CompileOptions
from benchmarks.peers.contender import Contender, Entrant, Rows
from benchmarks.peers.eager import Compiled, Eager
from benchmarks.peers.exported import ExportedOnnx, ExportedOpenVino
from benchmarks.peers.genai import GenAI
from benchmarks.prepare import prepare
from qeff_ir.frontend.weights import memory_weights
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


PEERS = ("eager", "compiled", "transformers-onnx", "openvino", "genai")
"""Names of the peers, as `--peers` takes them."""

_CHUNK = 128
"""Prompt tokens that one of our prefill runs takes, at most."""


def contenders(
    model: PreTrainedModel, rows: Rows, ctx_len: int, threads: int, folder: Path, peers: str
) -> list[Entrant]:
    """Ours, and the peers that are wanted, each ready to run or with the reason why it is missing.

    Args:
        model: The model, float32, on the CPU.
        rows: The prompts, for whoever compiles while warming up.
        ctx_len: Tokens that a fixed cache has room for.
        threads: Threads of each.
        folder: Where to put packages.
        peers: Names with commas, ``all`` or ``none``.

    Raises:
        typer.BadParameter: There is no such peer.
    """
    wanted = PEERS if peers == "all" else () if peers == "none" else tuple(peers.split(","))
    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"there is no peer '{unknown[0]}': it is one of {', '.join(PEERS)}")
    options = CompileOptions(prefill_seq_len=min(_CHUNK, len(rows[0])), ctx_len=ctx_len, batch_size=len(rows))
    ours = Ours(prepare(model, memory_weights(model), options, folder, threads=threads))
    made: dict[str, Callable[[], Entrant]] = {
        "eager": lambda: Entrant(Eager.name, Eager(model)),
        "compiled": lambda: _entrant(Compiled.name, None, lambda: Compiled(model, ctx_len, rows)),
        "transformers-onnx": lambda: _entrant(ExportedOnnx.name, None, lambda: ExportedOnnx(model, rows, threads)),
        "openvino": lambda: _entrant(ExportedOpenVino.name, "openvino", lambda: ExportedOpenVino(model, rows, threads)),
        "genai": lambda: _entrant(GenAI.name, "onnxruntime_genai", lambda: GenAI(model, ctx_len, threads, folder)),
    }
    return [Entrant(ours.name, ours), *(made[name]() for name in wanted)]


def _entrant(name: str, package: str | None, make: Callable[[], Contender]) -> Entrant:
    """A peer, ready to run, or the reason why it does not."""
    if package is not None and importlib.util.find_spec(package) is None:
        return Entrant(name, missing=f"{package} is not installed")
    try:
        return Entrant(name, make())
    except Exception as error:  # whatever the peer or its toolchain raises; it is reported
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return Entrant(name, missing=f"{type(error).__name__}: {first[:120]}")
