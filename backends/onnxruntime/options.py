"""What only ONNX Runtime is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from backends.options import CompileOptions


@dataclass(frozen=True)
class OnnxRuntimeOptions(CompileOptions):
    """How products with weights of few bits are computed.

    Attributes:
        matmul_level: 0 computes them in float32, and is exact; with 4, activations become 8-bit whole numbers, which is
            faster and not exact: the package then is *fast* (`qeff_ir.debug.drift`). It is the option ``level`` of the
            pass ``ort-matmul-nbits``.
    """

    title: ClassVar[str] = "ONNX Runtime"

    matmul_level: int = field(
        default=0,
        metadata={"help": "Products with weights of few bits: 0 is exact, 4 is fast and not exact.", "least": 0},
    )


Options = OnnxRuntimeOptions
"""By this name, the command line finds the options of a target in its folder."""
