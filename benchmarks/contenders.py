"""Who takes part in a race: ours first, then the peers that are wanted, or the reasons why they are missing."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer
from transformers import PreTrainedModel

from benchmarks.memory import resident
from benchmarks.ours import OWN, Ours, Own, compiled
from benchmarks.peers.compiled import Compiled
from benchmarks.peers.contender import WEIGHTS, Contender, Entrant, Rows, RunsAhead, titled
from benchmarks.peers.eager import Eager
from benchmarks.peers.genai import PRECISIONS, GenAI
from benchmarks.peers.llama_cpp import FORMS, LlamaCpp
from benchmarks.peers.onnx_export import OnnxExport
from benchmarks.peers.openvino_export import OpenVinoExport
from qeff_ir.ir.module import Module


@dataclass(frozen=True)
class Start:
    """What every contender is given.

    Attributes:
        model: The model, float32, on the CPU.
        module: The same as the frontend makes it; nobody changes it.
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
        make: Prepares the one who runs, with a form of weights; raises whatever it likes.
        needs: The modules that it needs beyond what qeff-ir itself needs, by the form of weights; it has no others.
    """

    name: str
    make: Callable[[Start, str], Contender]
    needs: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"f32": ()})


_NNCF = ("openvino", "nncf")

PEERS = {
    "eager": Peer(Eager.name, lambda start, _: Eager(start.model)),
    "compiled": Peer(Compiled.name, lambda start, _: Compiled(start.model, start.ctx_len)),
    "transformers-onnx": Peer(
        OnnxExport.name, lambda start, _: OnnxExport(start.model, len(start.rows), start.threads)
    ),
    "openvino": Peer(
        OpenVinoExport.name,
        lambda start, weights: OpenVinoExport(start.model, weights, len(start.rows), start.threads),
        {"f32": ("openvino",), "int8": _NNCF, "int4": _NNCF},
    ),
    "genai": Peer(
        GenAI.name,
        lambda start, weights: GenAI(start.model, weights, start.ctx_len, start.threads, start.folder),
        dict.fromkeys(PRECISIONS, ("onnxruntime_genai",)),
    ),
    "llama.cpp": Peer(
        LlamaCpp.name,
        lambda s, weights: LlamaCpp(s.model, weights, s.rows, s.ctx_len, s.threads, s.folder),
        dict.fromkeys(FORMS, ("xllamacpp", "gguf")),
    ),
}
"""The peers, by the names that `--peers` takes."""


def contenders(start: Start, peers: str, weights: str = "f32", ours: Sequence[str] = ()) -> list[Entrant]:
    """Ours, and the peers that are wanted, each ready to run or with the reason why it is missing.

    Args:
        start: What they are given.
        peers: Names with commas, ``all`` or ``none``.
        weights: Forms of weights with commas; a peer without a form has no row of it.
        ours: Edits of our pipeline; each is one more float32 row of ours.

    Raises:
        typer.BadParameter: There is no such peer or form.
    """
    wanted = list(PEERS) if peers == "all" else [] if peers == "none" else _known(peers, PEERS, "peer")
    made: list[Entrant] = []
    for form in _known(weights, WEIGHTS, "form of weights"):
        own = (*OWN[form], *(Own(edits, edits) for edits in ours if form == "f32"))
        made += [_entrant(row.name, form, start, functools.partial(_ours, row)) for row in own]
        made += [entrant(PEERS[name], start, form) for name in wanted if form in PEERS[name].needs]
    return made


def entrant(peer: Peer, start: Start, weights: str = "f32") -> Entrant:
    """Prepare a peer and let it try one step, so that whoever cannot run is found missing before the race.

    Returns:
        The peer, ready, or the first line of what it raised.
    """
    name = titled(peer.name, weights)
    for module in peer.needs[weights]:
        if importlib.util.find_spec(module) is None:
            return Entrant(name, missing=f"{module} is not installed", weights=weights)
    return _entrant(name, weights, start, peer.make)


def _entrant(name: str, weights: str, start: Start, make: Callable[[Start, str], Contender]) -> Entrant:
    try:
        made = make(start, weights)
        made.step(made.prefill(start.rows))
    except Exception as error:  # whatever a compiler, an exporter or a runtime raises; it is reported
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        return Entrant(name, missing=f"{type(error).__name__}: {first[:120]}", weights=weights)
    if isinstance(made, RunsAhead):
        made.finish()
    memory = None if made.before is None else resident() - made.before
    return Entrant(made.name, made, None, weights, memory, made.needed if isinstance(made, Ours) else None)


def _ours(own: Own, start: Start, weights: str) -> Ours:
    folder = Path(tempfile.mkdtemp(prefix="ours-", dir=start.folder))
    return compiled(own, start.module, start.rows, start.ctx_len, start.threads, folder)


def _known(text: str, known: Iterable[str], what: str) -> list[str]:
    for name in (name for name in text.split(",") if name not in known):
        raise typer.BadParameter(f"there is no {what} '{name}': it is one of {', '.join(known)}")
    return text.split(",")
