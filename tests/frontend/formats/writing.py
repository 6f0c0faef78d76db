"""Tiny models whose linear layers are quantized: the checkpoint in a format, and transformers' model of its numbers.

The numbers are those of the definition, computed here: no code that reads a format is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qeff_ir import QEFFAutoModelForCausalLM, numerics
from qeff_ir.arrays import Array
from qeff_ir.cli.lowered import LoweredOnce
from qeff_ir.frontend.source import open_source
from qeff_ir.testing.trace import compare, reference_trace, session_trace
from tests.support import PROMPTS, tiny

STEPS = 4


@dataclass(frozen=True)
class Grid:
    """A matrix rounded to a grid.

    Attributes:
        codes: Whole numbers, ``[out, in]``.
        zeros: The code of zero of each group, ``[out, groups]``.
        scales: Float16, ``[out, groups]``.
        group: The group of each input.
    """

    codes: Array
    zeros: Array
    scales: Array
    group: Array

    def numbers(self) -> Array:
        """What the codes mean, float32."""
        zeros, scales = self.zeros[:, self.group], self.scales.astype(np.float32)[:, self.group]
        return ((self.codes - zeros) * scales).astype(np.float32)


Pack = Callable[[Grid], Mapping[str, Array]]
"""The tensors of a linear layer by the ends of their names, as a format has them."""


def rounded(matrix: Array, bits: int, group: Array) -> Grid:
    """The matrix on a grid of its own for each group of inputs; zeros are whole, and not the middle."""
    count = int(group.max()) + 1
    low, high = (np.stack([of(matrix[:, group == g], axis=1) for g in range(count)], axis=1) for of in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.rint(-low / scales).astype(np.int64)
    codes = np.rint(matrix / scales[:, group]).astype(np.int64) + zeros[:, group]
    return Grid(np.clip(codes, 0, 2**bits - 1), zeros, scales, group)


def write(
    name: str,
    folder: Path,
    settings: Mapping[str, Any],
    pack: Pack,
    *,
    bits: int = 4,
    group: Callable[[int], Array] = lambda inputs: np.arange(inputs) // 16,
    alone: str = "router",
) -> PreTrainedModel:
    """Write a tiny model's checkpoint; returns transformers' own model of the numbers that the codes mean.

    Args:
        name: Of the tiny model.
        folder: To write into.
        settings: ``quantization_config``.
        pack: Of the format.
        bits: Of a code.
        group: The group of each of so many inputs.
        alone: Layers with this in their names are left alone; so are the head and the table of tokens.
    """
    dense, packed = folder.with_name(f"{folder.name}-dense"), dict[str, Array]()
    tiny(name)[1].save_pretrained(dense)
    plain = load_file(dense / "model.safetensors")
    for key, tensor in plain.items():
        layer = key.removesuffix(".weight")
        if tensor.ndim != 2 or any(part in key for part in ("embed", "head", "gate.", alone)):
            packed[key] = tensor
            continue
        tensor[0], tensor[1] = np.abs(tensor[0]), -np.abs(tensor[1])  # the zeros of their groups are the ends of a grid
        grid = rounded(tensor, bits, group(tensor.shape[1]))
        packed |= {f"{layer}.{end}": np.ascontiguousarray(part) for end, part in pack(grid).items()}
        plain[key] = grid.numbers()
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return AutoModelForCausalLM.from_pretrained(dense).eval()


def assert_weights_alike(folder: Path, model: PreTrainedModel) -> None:
    """Every weight that is read from a folder is the model's, to the last bit."""
    wanted, found = model.state_dict(), open_source(folder).weights()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), wanted[name].numpy(), err_msg=name)


def assert_answers_alike(folder: Path, model: PreTrainedModel, *targets: str) -> None:
    """Prompts in chunks and steps on each target, within the bound of the model's depth."""
    source = LoweredOnce(open_source(folder))
    limit = numerics.bound(numerics.depth(source.lower()))
    reference = reference_trace(model, PROMPTS, STEPS)
    for target in targets:
        compiled = QEFFAutoModelForCausalLM._opened(source)
        compiled.compile(
            target=target,
            batch_size=2,
            prefill_seq_len=8,
            ctx_len=48,
            emit_only=target != "onnxruntime",
            compile_dir=folder.with_name(target),
        )
        found = compare(session_trace(compiled.runner(threads=1).decoder, PROMPTS, reference.tokens), reference)
        assert found.equal(limit), (target, found, limit)
