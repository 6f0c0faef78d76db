"""What several tests need: models lowered once, sessions on modules, traces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir.arrays import Array
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.ir.snapshot import save_module
from qeff_ir.passing.manager import Report, run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.drawing_decoder import DrawingDecoder
from qeff_ir.specialize import specialize
from qeff_ir.testing.trace import Trace, reference_trace
from tests.models import VOCAB, build

CANONICAL = "canonicalize,unflatten"
OPTIONS = CompileOptions(prefill_seq_len=8, ctx_len=48, batch_size=2)
STEPS = 16

Mutation = Callable[[Module], None]


@functools.cache
def tiny(name: str) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """A tiny model; do not change it."""
    return build(name)


@functools.cache
def _lowered(name: str) -> Module:
    return Source(Memory(tiny(name)[1])).lower()


def lowered(name: str) -> Module:
    """A clone of a tiny model's module that may be changed."""
    return _lowered(name).clone()


@functools.cache
def _canonical(name: str) -> Module:
    module = lowered(name)
    specialize(module, OPTIONS)
    run_pipeline(module, Pipeline.parse(CANONICAL))
    return module


def canonical(name: str) -> Module:
    """A clone of a tiny model's module after `CANONICAL`, specialized for `OPTIONS`."""
    return _canonical(name).clone()


class Lowered(Source):
    """A model in memory that is lowered only once; equal to a plain `Source` in all that compilation sees."""

    def __init__(self, name: str) -> None:
        super().__init__(Memory(tiny(name)[1]))
        self.name = name

    def lower(self) -> Module:
        return lowered(self.name)


def prompts(lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    """Random prompts without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, n).tolist() for n in lengths]


PROMPTS = prompts([19, 5])
"""Longer than two chunks of eight, and shorter than one and than the window."""


@functools.cache
def reference(name: str) -> Trace:
    """transformers' trace of `PROMPTS`."""
    return reference_trace(tiny(name)[1], PROMPTS, STEPS)


def rest_of(backend: str) -> str:
    """A backend's pipeline after `CANONICAL`."""
    text = find_backend(backend).pipeline
    assert text.startswith(CANONICAL + ",")
    return text.removeprefix(CANONICAL + ",")


def open_decoder(module: Module, folder: Path, pipeline: str | None = None) -> Decoder:
    """Run the rest of the ONNX Runtime pipeline on a canonical module, and open a session on the result."""
    run_pipeline(module, Pipeline.parse(pipeline or rest_of("onnxruntime")))
    backend = find_backend("onnxruntime")
    backend.check(module, OPTIONS)
    backend.emit(module, folder, OPTIONS)
    return Decoder(backend.open(folder, threads=1))


def open_drawing(module: Module, folder: Path, text: str) -> DrawingDecoder:
    """As `open_decoder`, with a pass that lets the graph draw tokens."""
    run_pipeline(module, Pipeline.parse(rest_of("onnxruntime")).add(text))
    backend = find_backend("onnxruntime")
    backend.emit(module, folder, OPTIONS)
    return DrawingDecoder(backend.open(folder, threads=1))


def answers_alike(module: Module, plain: Module, target: str, folder: Path) -> None:
    """The package that a target makes of `module` answers as the graph of `plain` does: prompts, and a step."""
    backend, expected = find_backend(target), open_decoder(plain, folder / "plain")
    backend.check(module, OPTIONS)
    backend.emit(module, folder / "own", OPTIONS)
    own = Decoder(backend.open(folder / "own", threads=1))
    np.testing.assert_allclose(own.prefill(PROMPTS), expected.prefill(PROMPTS), atol=1e-5)
    np.testing.assert_allclose(own.decode([5, 6]), expected.decode([5, 6]), atol=1e-5)


def apply(module: Module, text: str) -> Report:
    """Run a pipeline."""
    return run_pipeline(module, Pipeline.parse(text))


def run_graph(module: Module, folder: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a module's graph as it is, ONNX Runtime's own rewriting off, one thread; device ops by the device's rules."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    folder.mkdir(parents=True, exist_ok=True)
    path = save_module(module, folder)
    proto = onnx.load(str(path), load_external_data=False)
    operators.give_rules(proto)
    onnx.save(proto, str(path))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found: Sequence[Any] = session.run(names, dict(feeds))
    return dict(zip(names, found, strict=True))


def assert_true_shapes(
    module: Module, folder: Path, feeds: Mapping[str, Array], sizes: Mapping[str, int]
) -> list[tuple[int | None, ...]]:
    """Compare each declared shape with what a run gives; returns what was declared, `None` for a size without a name.

    Every value becomes an output of the module.
    """
    made = [v for n in module.graph for v in n.outputs if v.shape is not None]
    declared = {
        str(v.name): tuple(d if isinstance(d, int) else sizes.get(d.value or "") for d in v.shape or ()) for v in made
    }
    module.graph.outputs.extend(v for v in made if not v.is_graph_output())
    found = run_graph(module, folder, feeds)
    wrong = {
        name: (shape, found[name].shape)
        for name, shape in declared.items()
        if any(said not in (None, true) for said, true in zip(shape, found[name].shape, strict=True))
    }
    assert wrong == {}
    return list(declared.values())


def random_feeds(module: Module, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """A run in the middle of a request: earlier tokens in the caches, the last column of row 1 padded.

    The caches hold random numbers in every slot, so that reading a slot that must not be read shows.
    """
    rng = np.random.default_rng(seed)
    batch, seq = sizes["batch_size"], sizes["seq_len"]
    positions = np.stack([np.arange(seq) + 3 + 2 * row for row in range(batch)]).astype(np.int64)
    positions[1, -1] = -1
    feeds: dict[str, Array] = {
        "input_ids": rng.integers(4, VOCAB, (batch, seq)).astype(np.int64),
        "position_ids": positions,
    }
    for resident in module.residents:
        shape = [sizes[d] if isinstance(d, str) else d for d in resident.shape]
        feeds[resident.input] = rng.standard_normal(shape).astype(np.float32)
    if any(resident.slots for resident in module.residents):
        feeds["lora_ids"] = np.arange(batch)[:, None] - 1
    return feeds


def generate(model: Any, **kwargs: Any) -> torch.Tensor:
    """transformers' own generation."""
    with torch.no_grad():
        result = model.generate(**kwargs)
    assert isinstance(result, torch.Tensor)
    return result


def forward(name: str, tokens: Sequence[int]) -> Array:
    """transformers' logits of the last of `tokens`."""
    with torch.no_grad():
        return tiny(name)[1](torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].numpy()


@functools.cache
def _plain_package(name: str, target: str, options: tuple[tuple[str, int], ...]) -> Path:
    from qeff_ir.compiler import compile_model

    source, settings = Lowered(name), CompileOptions(**dict[str, Any](options))
    return compile_model(source, settings, target=target, emit_only=target == "ai100").folder


def plain_decoder(name: str, target: str, **options: int) -> Decoder:
    """A tiny model compiled without anything else, and opened anew."""
    folder = _plain_package(name, target, tuple(sorted(options.items())))
    return Decoder(find_backend(target).open(folder, threads=1))
