"""Raise decomposed root-mean-square normalizations to the standard `RMSNormalization`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion import _rms_normalization as rules

from qeff_ir.module import Module
from qeff_ir.passing.base import Pass, Rewriter, register


@register
@dataclass(frozen=True, slots=True)
class FuseNorms(Pass):
    """Fuse ``x * rsqrt(mean(x^2) + eps) * scale`` into `RMSNormalization` (onnxscript's rules).

    Layer normalization needs no rule: the exporter already writes it as one op.
    """

    name: ClassVar[str] = "fuse-norms"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Apply the rules; a reciprocal root that stays behind is reported as missed."""
        rewriter.apply_rules("RMSNormalization", rules.rms_normalization_rules)
        for node in module.graph:
            if node.op_type == "Reciprocal" and _is_mean_square_root(node):
                rewriter.missed(node, "the normalized value is not multiplied by a scale")


def _is_mean_square_root(node: ir.Node) -> bool:
    """Whether a node is 1 / sqrt(mean(...) + eps)."""
    for op_type in ("Sqrt", "Add", "ReduceMean"):
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != op_type:
            return False
        node = producer
    return True
