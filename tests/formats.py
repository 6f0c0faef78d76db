"""Tiny models in quantized formats: written as their packers do, and held against transformers on both targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qeff_ir import QEFFAutoModelForCausalLM, numerics
from qeff_ir.cli.lowered import LoweredOnce
from qeff_ir.frontend.source import Source, open_source
from qeff_ir.quantized import Quantized, quantized
from qeff_ir.testing.trace import Trace, compare, reference_trace, session_trace
from tests.support import prompts, tiny

Tensors = dict[str, torch.Tensor]
PROMPTS = prompts([11, 5])
STEPS = 3
TARGETS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"target": "onnxruntime"},
    "ai100": {"target": "ai100", "emit_only": True},
}


def write(
    name: str, folder: Path, settings: Mapping[str, Any], packed: Callable[[str, torch.Tensor], Tensors | None]
) -> Path:
    """Save a tiny model with the tensors that `packed` makes of a weight; those of `None` stay as they are.

    Args:
        name: Of the model.
        folder: Where to.
        settings: ``quantization_config``.
        packed: Takes the key of a weight of two axes or more, and its numbers.
    """
    tiny(name)[1].save_pretrained(folder)
    tensors: Tensors = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        made = packed(key, weight) if weight.ndim > 1 else None
        tensors |= {key: weight} if made is None else made
    save(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def save(folder: Path, tensors: Tensors) -> None:
    """Replace the weights of a folder."""
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def changed(folder: Path, change: Callable[[Tensors], object]) -> Source:
    """The folder after `change` of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save(folder, tensors)
    return open_source(folder)


def found(source: Source) -> dict[str, Quantized]:
    """The quantized weights by the names of the parameters."""
    parts = {name: quantized(tensor) for name, tensor in source.weights().items()}
    return {name: p for name, p in parts.items() if p is not None}


def same_numbers(source: Source) -> None:
    """Each parameter has the numbers that transformers loads, to the bit."""
    assert not source.decoded_here()
    weights, theirs = source.weights(), source.reference().state_dict()
    assert theirs.keys() == weights.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(weights[name].numpy(), tensor.numpy(), err_msg=name)


def both_sessions(source: Source, folder: Path, **options: Any) -> None:
    """ONNX Runtime and the emulator of the AI 100 answer as the reference does."""
    once = LoweredOnce(source)
    reference = reference_trace(source.reference(), PROMPTS, STEPS)
    limit = numerics.bound(numerics.depth(once.lower()))
    for name, target in TARGETS.items():
        model = QEFFAutoModelForCausalLM._opened(once)
        shapes: dict[str, Any] = {"batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48, "compile_dir": folder / name}
        model.compile(**{**shapes, **target, **options})
        answer: Trace = session_trace(model.runner(threads=1).decoder, PROMPTS, reference.tokens)
        told = compare(answer, reference)
        assert told.equal(limit), (name, told, limit)
