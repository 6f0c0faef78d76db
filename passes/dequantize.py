"""Let quantized weights be float32, for a target that has no kernel for codes, or that compresses by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.quantized import plain, quantized


@register
@dataclass(frozen=True, slots=True)
class Dequantize(Pass):
    """Make each weight that is still quantized a float32 one of the same numbers, lazily, to be written so.

    It stands behind the passes that take codes: `nbits` of the AI 100, say. Files get four bytes for each number,
    whatever the checkpoint has.

    Guarantees: no weight is quantized.
    """

    name: ClassVar[str] = "dequantize"
    phase: ClassVar[Phase] = Phase.LOWER
    changes_weights: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Change the tensors; the graph stays as it is."""
        for name, value in module.graph.initializers.items():
            parts = quantized(value.const_value)
            if parts is not None and rewriter.rewrite("weight"):
                value.const_value = plain(name, parts)
