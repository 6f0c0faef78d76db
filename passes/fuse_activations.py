"""Raise decomposed activations to the standard `Swish` and `Gelu`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import register
from qeff_ir.passing.matching import scalar
from qeff_ir.passing.rules import RulePass

_TANH_SCALE = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715
"""Constants of the tanh approximation, D. Hendrycks and K. Gimpel, "Gaussian Error Linear Units", 2016."""


def _swish(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Sigmoid(x))


def _to_swish(op: Any, x: Any) -> Any:
    return op.Swish(x, alpha=1.0)


def _swish_commuted(op: Any, x: Any) -> Any:
    return op.Mul(op.Sigmoid(x), x)


def _gelu_erf(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Mul(0.5, op.Add(op.Erf(op.Div(x, math.sqrt(2.0))), 1.0)))


def _gelu_erf_half_first(op: Any, x: Any) -> Any:
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Div(x, math.sqrt(2.0))), 1.0))


def _to_gelu(op: Any, x: Any) -> Any:
    return op.Gelu(x)


def _gelu_tanh(op: Any, x: Any) -> Any:
    inner = op.Mul(_TANH_SCALE, op.Add(x, op.Mul(_CUBIC, op.Pow(x, 3.0))))
    return op.Mul(x, op.Mul(0.5, op.Add(op.Tanh(inner), 1.0)))


def _gelu_tanh_half_first(op: Any, x: Any) -> Any:
    inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), _CUBIC)), _TANH_SCALE)
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


def _gelu_tanh_factored(op: Any, x: Any) -> Any:
    inner = op.Mul(op.Mul(x, _TANH_SCALE), op.Add(op.Mul(op.Mul(x, _CUBIC), x), 1.0))
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


def _to_gelu_tanh(op: Any, x: Any) -> Any:
    return op.Gelu(x, approximate="tanh")


_RULES = {
    "Swish": [(_swish, _to_swish), (_swish_commuted, _to_swish)],
    "Gelu": [(_gelu_erf, _to_gelu), (_gelu_erf_half_first, _to_gelu)],
    "Gelu tanh": [
        (_gelu_tanh, _to_gelu_tanh),
        (_gelu_tanh_half_first, _to_gelu_tanh),
        (_gelu_tanh_factored, _to_gelu_tanh),
    ],
}
"""By the name counted: the spellings that torch and transformers use, each with its replacement."""


@register
@dataclass(frozen=True, slots=True)
class FuseActivations(RulePass):
    """Fuse ``x * sigmoid(x)`` into `Swish`, and the error-function and tanh forms of GELU into `Gelu`.

    Activations of other forms stay as they are; they are right, only slower.
    """

    name: ClassVar[str] = "fuse-activations"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    idempotent: ClassVar[bool] = True

    def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
        """The spellings that torch and transformers use."""
        return {name: [RewriteRule(*pair) for pair in pairs] for name, pairs in _RULES.items()}

    def sites(self, module: Module) -> list[ir.Node]:
        """Sigmoids that gate what they are made of, and the ``erf + 1`` and ``tanh + 1`` of a GELU."""
        return [node for node in module.graph if node.domain == "" and _is_gate(node)]


def _is_gate(node: ir.Node) -> bool:
    users = list(node.outputs[0].consumers())
    if node.op_type == "Sigmoid":
        return any(user.op_type == "Mul" and node.inputs[0] in user.inputs for user in users)
    return node.op_type in ("Erf", "Tanh") and any(
        user.op_type == "Add" and 1.0 in map(scalar, user.inputs) for user in users
    )
