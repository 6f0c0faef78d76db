"""Keep constants inside the range of half precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import CHANGED_KEY, WEIGHT_KEY, Module
from qeff_ir.numerics import Approximates, Numeric
from qeff_ir.passing.base import Pass, Phase, Rewriter, register

FP16_MAX = 65504.0


@register
@dataclass(frozen=True, slots=True)
class Fp16Clip(Pass):
    """Clip float constants to ±65504, the range that a compiler working in half precision can hold.

    ``+inf`` becomes 65504; ``-inf``, which only masks use, stays (AI 100 contract §8). Weights are looked at only with
    ``weights=true``, which reads the whole checkpoint once; one that exceeds the range is clipped when it is written.
    """

    name: ClassVar[str] = "fp16-clip"
    phase: ClassVar[Phase] = Phase.LOWER
    establishes: ClassVar[frozenset[str]] = frozenset({"fp16-range"})
    changes_weights: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Approximates("what half precision cannot hold is clipped", decibels=60.0)
    idempotent: ClassVar[bool] = True

    weights: bool = field(default=False, metadata={"help": "look at the weights too"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Replace every tensor that has a number out of range."""
        for value in module.graph.initializers.values():
            tensor = value.const_value
            is_weight = WEIGHT_KEY in value.metadata_props
            if tensor is None or not tensor.dtype.is_floating_point() or (is_weight and not self.weights):
                continue
            numbers = tensor.numpy()
            if not np.any((numbers > FP16_MAX) | ((numbers < -FP16_MAX) & ~np.isneginf(numbers))):
                continue
            if not rewriter.rewrite("weight" if is_weight else "constant"):
                continue
            if is_weight:
                value.metadata_props[CHANGED_KEY] = "fp16-clip"
            value.const_value = (
                ir.LazyTensor(
                    lambda tensor=tensor: ir.tensor(clip(tensor.numpy()), name=tensor.name),
                    tensor.dtype,
                    ir.Shape(tensor.shape.numpy()),
                    name=tensor.name,
                )
                if is_weight
                else ir.tensor(clip(numbers), name=tensor.name)
            )


def clip(numbers: np.ndarray) -> np.ndarray:
    """The numbers, clipped to ±65504 except for ``-inf``."""
    return np.where(np.isneginf(numbers), numbers, np.clip(numbers, -FP16_MAX, FP16_MAX)).astype(numbers.dtype)
