"""Multiply with weights of 4 bits in the operator that the compiler takes for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.nbits_layout import DOMAIN, misfit, pack, products_of, readers_of, readers_of_codes
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Missed, Pass, Phase, Rewriter, register
from qeff_ir.passing.weights import stored
from qeff_ir.quantized import Quantized, quantized


@register
@dataclass(frozen=True, slots=True)
class NBits(Pass):
    """Write products with weights of 4 bits as `MatMulNBits` (contract §2.3); a bias stays a sum of its own.

    Other weights that are quantized are left: codes of 8 bits, experts, and what is not read by products alone, as the
    table of a tied head. The contract (§10) has them in float32, which `dequantize` makes of them.
    """

    name: ClassVar[str] = "nbits"
    phase: ClassVar[Phase] = Phase.LOWER
    changes_weights: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Replace all products of a weight, or none: it would be there twice."""
        for value in list(module.graph.initializers.values()):
            parts = quantized(value.const_value)
            if parts is None or _reason(value, parts) is not None or rewriter.refused:
                continue
            weight = pack(rewriter, value, parts, flat=True)
            for node in products_of(value):
                product = rewriter.at(node)(
                    "MatMulNBits",
                    node.inputs[0],
                    weight.codes,
                    weight.scales,
                    weight.zeros,
                    domain=DOMAIN,
                    K=weight.features,
                    N=weight.outputs,
                    bits=weight.bits,
                    block_size=weight.block,
                )
                rewriter.replace(node, product, "MatMulNBits")
        rewriter.sweep()
        if rewriter.stats.fired:
            module.model.opset_imports[DOMAIN] = 1

    def sites(self, module: Module) -> list[ir.Node]:
        """All nodes that read a quantized weight."""
        return list(readers_of_codes(module))

    def explain(self, module: Module, site: ir.Node) -> Missed:
        """Why a weight is left."""
        value = readers_of_codes(module)[site]
        parts = quantized(value.const_value)
        reason = None if parts is None else _reason(value, parts)
        return Missed.at(site, f"{value.name} is left: {reason or 'the pass did not touch it'}")


def _reason(value: ir.Value, parts: Quantized) -> str | None:
    """Why a weight is left, as one clause."""
    products, readers = products_of(value), readers_of(value)
    other = next((node for node in readers if node not in products), None)
    if other is not None or not products:
        return f"a {other.op_type} reads it" if other is not None else "nothing reads it"
    weights = [found for node in products if (found := stored(node)) is not None]
    if len({weight.transposed for weight in weights}) > 1:
        return "one product reads it as it is, another transposed"
    if parts.codes.dtype.bitwidth != 4:
        return f"its codes are {parts.codes.dtype.name}"
    return misfit(parts, 1 - weights[0].out_axis)
