"""How far two computations of the same numbers may lie apart, and comparisons that refuse to compare nothing.

The bound is ``8 u sqrt(d)`` on ``max|error| / rms(reference)``: ``u`` is the unit roundoff, ``d`` the depth, the number
of matrix products that follow one another. Rounding errors of a chain of such blocks grow more slowly than the square
root of its length; a wrong scale, mask or position is thousands of times above the bound.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import LOGITS

UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""

ROUNDOFF = {
    ir.DataType.FLOAT: UNIT_ROUNDOFF,
    ir.DataType.FLOAT16: 2.0**-11,
    ir.DataType.BFLOAT16: 2.0**-8,
}
"""Unit roundoff of each float type: half the distance from 1 to the next number."""

LARGEST = {ir.DataType.FLOAT16: 65504.0}
"""The largest number of a type that numbers of models may exceed."""

_PRODUCTS = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "Einsum", "Conv"), 1),
    **dict.fromkeys(("Attention", "SinkAttention", "GroupQueryAttention", "LinearAttention"), 2),
}
"""Matrix products inside an operator."""


def bound(depth: int, dtype: ir.DataType = ir.DataType.FLOAT) -> float:
    """Largest ``max|error| / rms(reference)`` for a computation of that many matrix products in a row.

    Args:
        depth: How many.
        dtype: What results are rounded to. Sums inside a product are float32 for each of them.
    """
    return 8.0 * ROUNDOFF[dtype] * math.sqrt(depth)


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


def signal_to_noise(values: Array, reference: Array) -> float:
    """Power of the reference over that of the error, in decibels; infinite when nothing differs.

    Raises:
        ValueError: As `error_over_rms`.
    """
    if not math.isfinite(error_over_rms(values, reference)):
        return -math.inf
    right = np.asarray(reference, dtype=np.float64)
    noise = float(np.mean((np.asarray(values, dtype=np.float64) - right) ** 2))
    return 10.0 * math.log10(float(np.mean(right**2)) / noise) if noise else math.inf


@dataclass(frozen=True)
class Observed:
    """The same answer, computed three times.

    Attributes:
        before: By the module before a pass.
        after: By the module after it.
        exact: In double precision, by nothing that the two share.
        depth: Matrix products in a row, of the module before the pass.
    """

    before: Array
    after: Array
    exact: Array
    depth: int


class Numeric(ABC):
    """What a pass promises about the numbers that a module answers."""

    @abstractmethod
    def problem(self, seen: Observed) -> str | None:
        """How the promise is broken, as one clause, or `None`.

        Raises:
            ValueError: The comparison would mean nothing, see `error_over_rms`.
        """


@dataclass(frozen=True)
class Exact(Numeric):
    """Not one bit changes: data moves, names change, dead code goes."""

    def problem(self, seen: Observed) -> str | None:
        """See the base."""
        error = error_over_rms(seen.after, seen.before)  # for its refusals
        error_over_rms(seen.before, seen.exact)
        same = seen.after.dtype == seen.before.dtype and seen.after.tobytes() == seen.before.tobytes()
        return None if same else f"it promises the very same bits, but the error is {error:.2e}"


@dataclass(frozen=True)
class Reassociates(Numeric):
    """The same real numbers, rounded in another order.

    The error after the pass stays within `bound`, and within four times the error before it plus one rounding for each
    product in the depth, so that a well-conditioned module cannot hide a small mistake below the bound.
    """

    def problem(self, seen: Observed) -> str | None:
        """See the base."""
        before, after = error_over_rms(seen.before, seen.exact), error_over_rms(seen.after, seen.exact)
        limit = min(bound(seen.depth), 4.0 * before + UNIT_ROUNDOFF * max(seen.depth, 4))
        return None if after <= limit else f"its error is {after:.2e} of {limit:.2e} allowed ({before:.2e} before)"


@dataclass(frozen=True)
class Approximates(Numeric):
    """Other numbers on purpose.

    Attributes:
        reason: Why, as one clause.
        decibels: Least ratio of signal to noise.
    """

    reason: str
    decibels: float

    def problem(self, seen: Observed) -> str | None:
        """See the base."""
        ratio = signal_to_noise(seen.after, seen.exact)
        return None if ratio >= self.decibels else f"{ratio:.1f} dB of {self.decibels:.1f} dB are left ({self.reason})"


def depth(module: Module, output: str | None = None) -> int:
    """The largest number of matrix products on a way from the inputs to an output, the logits by default."""
    longest: dict[ir.Value, int] = {}
    for node in module.graph:
        before = max((longest.get(v, 0) for v in node.inputs if v is not None), default=0)
        for out in node.outputs:
            longest[out] = before + _PRODUCTS.get(node.op_type, 0)
    return longest.get(module.port(LOGITS) if output is None else module.output(output), 0)
