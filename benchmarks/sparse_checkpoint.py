"""A checkpoint of any size that takes no disk: valid safetensors files whose data are holes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.forms import FORMS, Form, Tensor
from qeff_ir.frontend.checkpoint.skeleton import build_skeleton

_BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
_BLOCK = 128
"""Inputs that share a scale, or fewer where that many do not divide those of a layer."""


def write_checkpoint(config: PreTrainedConfig, folder: Path, *, form: Form = FORMS["f32"], shards: int = 4) -> int:
    """Write ``config.json``, the shards and their index into `folder`; every number reads as zero.

    Args:
        config: Whose parameters to write.
        folder: An empty folder.
        form: What they are stored as.
        shards: Number of files.

    Returns:
        Number of parameters.
    """
    model = build_skeleton(config)
    tied = set(model.all_tied_weights_keys or {})
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}
    linear = _linear(model) if form.linear else frozenset[str]()
    block = math.gcd(_BLOCK, *(shapes[name][1] for name in linear))
    stored: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if form.linear is not None and name in linear:
            (outputs, inputs), layer = shape, name.removesuffix("weight")
            stored |= {layer + end: tensor for end, tensor in form.linear(outputs, inputs, block).items()}
        else:
            stored[name] = form.dtype, shape
    names = list(stored)
    size = math.ceil(len(names) / shards)
    places: dict[str, str] = {}
    for index, start in enumerate(range(0, len(names), size)):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        chosen = names[start : start + size]
        _write_shard(folder / file, {name: stored[name] for name in chosen})
        places |= dict.fromkeys(chosen, file)
    data = {"metadata": {"total_size": sum(map(_size, stored.values()))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))
    fields = config.to_dict() | ({"quantization_config": form.settings(block)} if form.settings else {})
    (folder / "config.json").write_text(json.dumps(fields))
    return sum(map(math.prod, shapes.values()))


def _linear(model: PreTrainedModel) -> frozenset[str]:
    """The weights that are quantized."""
    head = model.get_output_embeddings()
    found = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return frozenset(f"{name}.weight" for name in found)


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _size((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of eight, as the format wants
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _size(tensor: Tensor) -> int:
    return _BYTES[tensor[0]] * math.prod(tensor[1])
