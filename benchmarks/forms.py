"""Forms of checkpoints: the tensors that a linear layer is stored as, and the type of all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Tensor = tuple[str, tuple[int, ...]]
"""Element type as safetensors spells it, and sizes."""


def _awq(outputs: int, inputs: int, block: int) -> dict[str, Tensor]:
    groups = inputs // block
    return {
        "qweight": ("I32", (inputs, outputs // 8)),
        "qzeros": ("I32", (groups, outputs // 8)),
        "scales": ("F16", (groups, outputs)),
    }


def _fp8(outputs: int, inputs: int, block: int) -> dict[str, Tensor]:
    return {
        "weight": ("F8_E4M3", (outputs, inputs)),
        "weight_scale_inv": ("F32", (-(-outputs // block), -(-inputs // block))),
    }


@dataclass(frozen=True)
class Form:
    """A form of checkpoints.

    Attributes:
        dtype: Of tensors that are no linear layer's weight, and of these where `linear` is `None`.
        linear: The tensors of a linear layer by the ends of their names, of its outputs, its inputs and the block.
        settings: ``quantization_config`` of a block.
    """

    dtype: str
    linear: Callable[[int, int, int], Mapping[str, Tensor]] | None = None
    settings: Callable[[int], dict[str, Any]] | None = None


FORMS: dict[str, Form] = {
    "f32": Form("F32"),
    "bf16": Form("BF16"),
    "f16": Form("F16"),
    "awq": Form("F16", _awq, lambda block: {"quant_method": "awq", "bits": 4, "group_size": block, "version": "gemm"}),
    "fp8": Form("BF16", _fp8, lambda block: {"quant_method": "fp8", "weight_block_size": [block, block]}),
}
"""By the name of an option; the head and the table of tokens are never quantized."""
