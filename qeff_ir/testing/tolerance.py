"""How far two computations of the same numbers may lie apart, and comparisons that refuse to compare nothing.

The bound is ``8 u sqrt(d)`` on ``max|error| / rms(reference)``: ``u`` is the unit roundoff, ``d`` the depth, the number
of matrix products that follow one another. Rounding errors of a chain of such blocks grow more slowly than the square
root of its length; a wrong scale, mask or position is thousands of times above the bound.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qeff_ir.module import Module
from qeff_ir.runtime.session import Array

UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""

_PRODUCTS = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "Einsum"), 1),
    **dict.fromkeys(("Attention", "SinkAttention", "GroupQueryAttention", "LinearAttention"), 2),
}
"""Matrix products inside an operator."""


def bound(depth: int) -> float:
    """Largest ``max|error| / rms(reference)`` for a computation of that many matrix products in a row, float32."""
    return 8.0 * UNIT_ROUNDOFF * math.sqrt(depth)


def error_over_rms(values: Array, reference: Array) -> float:
    """``max|values - reference| / rms(reference)``.

    Raises:
        ValueError: The comparison would mean nothing: shapes differ, or the reference is empty, constant or not finite.
    """
    reference = np.asarray(reference, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    if values.shape != reference.shape:
        raise ValueError(f"shapes differ: {values.shape} and {reference.shape}")
    if reference.size == 0 or not np.isfinite(reference).all() or np.ptp(reference) == 0.0:
        raise ValueError("the reference is empty, constant or not finite: nothing can be learnt from comparing with it")
    if not np.isfinite(values).all():
        return math.inf
    return float(np.abs(values - reference).max() / np.sqrt(np.mean(reference**2)))


def depth(module: Module) -> int:
    """The largest number of matrix products on a way from the inputs to ``logits``."""
    longest: dict[ir.Value, int] = {}
    for node in module.graph:
        before = max((longest.get(v, 0) for v in node.inputs if v is not None), default=0)
        for out in node.outputs:
            longest[out] = before + _PRODUCTS.get(node.op_type, 0)
    return longest.get(module.output("logits"), 0)
