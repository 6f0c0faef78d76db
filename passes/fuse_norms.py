"""Raise decomposed root-mean-square normalizations to the standard `RMSNormalization`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule
from onnxscript.rewriter.rules.fusion import _rms_normalization as rules

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import register
from qeff_ir.passing.rules import RulePass


@register
@dataclass(frozen=True, slots=True)
class FuseNorms(RulePass):
    """Fuse ``x * rsqrt(mean(x^2) + eps) * scale`` into `RMSNormalization` (onnxscript's rules).

    The scale is one number for each feature; a product with anything else, such as a gate, stays a product.
    Layer normalization needs no rule: the exporter already writes it as one op.
    """

    name: ClassVar[str] = "fuse-norms"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    idempotent: ClassVar[bool] = True

    def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
        """The rule of onnxscript, for both orders of the last product."""
        return {
            "RMSNormalization": [_Norm.rule("norm first", mul_order=True), _Norm.rule("scale first", mul_order=False)]
        }

    def sites(self, module: Module) -> list[ir.Node]:
        """Reciprocal roots of a mean."""
        return [node for node in module.graph if node.op_type == "Reciprocal" and _is_mean_square_root(node)]


class _Norm(rules.RmsNormFusion):
    """onnxscript's rule takes any value for the scale."""

    def check(
        self, op: Any, x: ir.Value, scale: ir.Value, epsilon: Any, compute_dtype: Any, target_dtype: Any, **_: Any
    ) -> MatchResult:
        """Whether what was matched is a norm; see the rule."""
        if scale.shape is None or len(scale.shape) != 1:
            return MatchResult().fail("the scale is not one number for each feature", scale)
        return super().check(op, x, scale, epsilon, compute_dtype, target_dtype)


def _is_mean_square_root(node: ir.Node) -> bool:
    """Whether a node is 1 / sqrt(mean(...) + eps)."""
    for op_type in ("Sqrt", "Add", "ReduceMean"):
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != op_type:
            return False
        node = producer
    return True
