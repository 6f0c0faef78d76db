"""Whoever takes part in a race: reads prompts, then continues greedily, one step at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import typer
from transformers import DynamicCache, PreTrainedModel, StaticCache

from backends.base import CompileOptions
from benchmarks.prepare import prepare
from qeff_ir.frontend.weights import memory_weights
from qeff_ir.runtime.decoder import Decoder

Rows = list[list[int]]


class Contender(Protocol):
    """One way to run the model."""

    name: str

    def prefill(self, rows: Rows) -> list[int]:
        """Forget everything, read the prompts (all of one length), return each row's next token."""
        ...

    def step(self, tokens: list[int]) -> list[int]:
        """Append one token to every row, return each row's next token."""
        ...


@dataclass(frozen=True)
class Entrant:
    """Somebody who takes part, or would: with a reason why not, which the figures report.

    Attributes:
        name: Who.
        contender: The one who runs; `None` when missing.
        missing: Why it does not run here.
    """

    name: str
    contender: Contender | None = None
    missing: str | None = None


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


class Eager:
    """transformers as it comes: SDPA attention and a cache that grows."""

    name = "transformers, eager"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: Any = None

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache = DynamicCache(config=self.model.config)
        return _next(self.model, self.cache, rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return _next(self.model, self.cache, [[token] for token in tokens])


class Compiled:
    """transformers' fast way: a static cache, decode steps through `torch.compile`, prefill eager as in `generate`.

    Args:
        model: The model.
        ctx_len: Tokens that the cache has room for.
        warmup: Prompts to compile with; raises what `torch.compile` raises.
    """

    name = "transformers, static cache + torch.compile"

    def __init__(self, model: PreTrainedModel, ctx_len: int, warmup: Rows) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=ctx_len)
        self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
        self.step(self.prefill(warmup))

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache.reset()
        return _next(self.model, self.cache, rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return _next(self.forward, self.cache, [[token] for token in tokens])


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
        "compiled": lambda: _compiled(model, ctx_len, rows),
        "transformers-onnx": lambda: Entrant("transformers, ONNX exporter", missing="there is no runner for it yet"),
        "openvino": lambda: _absent("OpenVINO", "openvino"),
        "genai": lambda: _absent("ONNX Runtime GenAI", "onnxruntime_genai"),
    }
    return [Entrant(ours.name, ours), *(made[name]() for name in wanted)]


def _absent(name: str, module: str) -> Entrant:
    installed = importlib.util.find_spec(module) is not None
    return Entrant(name, missing="there is no runner for it yet" if installed else f"{module} is not installed")


def _compiled(model: PreTrainedModel, ctx_len: int, rows: Rows) -> Entrant:
    try:
        return Entrant(Compiled.name, Compiled(model, ctx_len, rows))
    except Exception as error:  # whatever the compiler or its toolchain raises; it is reported
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return Entrant(Compiled.name, missing=f"{type(error).__name__}: {first[:80]}")


@torch.no_grad()  # as in `generate`
def _next(forward: Callable[..., Any], cache: Any, rows: Rows) -> list[int]:
    out = forward(input_ids=torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1).tolist()
