"""Operators written in older ones, as `legalize` needs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from backends.ai100 import operators
from qeff_ir.passing.base import OpBuilder


@dataclass(frozen=True)
class Lowering:
    """A form of an operator in older ones.

    Attributes:
        make: Writes it.
        takes: Attributes that it takes into account; all others must have their default values.
        inputs: How many inputs it takes.
    """

    make: Callable[[ir.Node, OpBuilder], ir.Value]
    takes: frozenset[str]
    inputs: int


def _rms_normalization(node: ir.Node, b: OpBuilder) -> ir.Value:
    x, scale = node.inputs[:2]
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return b("CustomRMSNorm", x, scale, domain=operators.QTI_DOMAIN, epsilon=epsilon)


def _rotary_embedding(node: ir.Node, b: OpBuilder) -> ir.Value:
    """``x`` is ``[B, H, S, D]``; cosine and sine are ``[B, S, D/2]``."""
    x, cos, sin = node.inputs[:3]
    assert x is not None and x.shape is not None
    axis, half, end = b.const([3]), b.const([int(x.shape[3]) // 2]), b.const([int(x.shape[3])])  # pyright: ignore[reportArgumentType]
    first = b("Slice", x, b.const([0]), half, axis)
    second = b("Slice", x, half, end, axis)
    cos, sin = (b("Unsqueeze", v, b.const([1])) for v in (cos, sin))
    low = b("Sub", b("Mul", first, cos), b("Mul", second, sin))
    high = b("Add", b("Mul", second, cos), b("Mul", first, sin))
    return b("Concat", low, high, axis=-1)


def _swish(node: ir.Node, b: OpBuilder) -> ir.Value:
    x, alpha = node.inputs[0], node.attributes.get_float("alpha", 1.0)
    return b("Mul", x, b("Sigmoid", x if alpha == 1.0 else b("Mul", x, b.const(alpha, np.float32))))


def _gelu(node: ir.Node, b: OpBuilder) -> ir.Value:
    x = node.inputs[0]

    def f(number: float) -> ir.Value:
        return b.const(number, np.float32)

    tanh = "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh"
    if tanh:
        cubic = b("Mul", b("Mul", b("Mul", x, x), x), f(0.044715))
        gate = b("Tanh", b("Mul", b("Add", x, cubic), f(math.sqrt(2.0 / math.pi))))
    else:
        gate = b("Erf", b("Mul", x, f(math.sqrt(0.5))))
    return b("Mul", b("Mul", x, f(0.5)), b("Add", gate, f(1.0)))


LOWERINGS = {
    "RMSNormalization": Lowering(_rms_normalization, frozenset({"epsilon"}), 2),
    "RotaryEmbedding": Lowering(_rotary_embedding, frozenset(), 3),
    "Swish": Lowering(_swish, frozenset({"alpha"}), 1),
    "Gelu": Lowering(_gelu, frozenset({"approximate"}), 1),
}
"""By operator."""
