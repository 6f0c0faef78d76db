"""What each operator computes in when a model is loaded in 16 bits, for `dtype`."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.numerics import LARGEST

NORMS = frozenset(
    {
        "CustomRMSNorm", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization",
        "MeanVarianceNormalization", "RMSNormalization",
    }
)  # fmt: skip
"""Computed in float32; the result is rounded."""

WIDENING = frozenset(
    {
        "CumSum", "Erf", "Exp", "LinearAttention", "Log", "LogSoftmax", "Pow", "Reciprocal", "ReduceL1", "ReduceL2",
        "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sigmoid", "Softmax", "Softplus",
        "Sqrt", "Tanh",
    }
)  # fmt: skip
"""Computed in float32; so is what follows, up to activations."""

CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Sums of products: operands are rounded, and so is the result."""

MOVES = frozenset(
    {
        "Clip", "Compress", "Concat", "CtxGather", "CtxGatherBlockedKV", "CtxGatherBlockedKVCB", "CtxGatherCB",
        "CtxGatherCB3D", "CtxScatter", "CtxScatterCB", "CtxScatterCB3D", "Expand", "Gather", "GatherElements",
        "GatherND", "Identity", "Max", "MergeRows", "Min",
        "Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "StateNext", "StateWindow",
        "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""They move numbers, or choose among them, and round none."""


def rounded(numbers: Array, dtype: ir.DataType) -> Array:
    """The numbers in a type; what float16 cannot hold becomes its largest number, but for ``-inf``, which masks use."""
    if dtype == ir.DataType.FLOAT16:
        most = LARGEST[dtype]
        numbers = np.where(np.isneginf(numbers), numbers, np.clip(numbers, -most, most))
    return numbers.astype(dtype.numpy())


@functools.cache
def takes(op_type: str, opset: int, dtype: ir.DataType) -> bool:
    """Whether a standard operator takes a float type; one that is not known does."""
    try:
        schema = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return True
    floats = [set(c.allowed_type_strs) for c in schema.type_constraints if "tensor(float)" in c.allowed_type_strs]
    return all(f"tensor({dtype.name.lower()})" in allowed for allowed in floats)
