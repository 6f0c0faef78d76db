"""Multiply with weights of few bits, and look rows of them up, without writing them out as float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from passes.nbits_layout import DOMAIN, Packed, doubled, misfit, pack, products_of, readers_of, readers_of_codes
from qeff_ir.arrays import Array
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Missed, OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import operand
from qeff_ir.passing.properties import FAST
from qeff_ir.passing.weights import added, stored
from qeff_ir.quantized import Quantized, lazy, quantized


@register
@dataclass(frozen=True, slots=True)
class OrtMatMulNBits(Pass):
    """Select ONNX Runtime kernels for quantized weights: `MatMulNBits` for products, `GatherBlockQuantized` for rows.

    With ``level=0``, products are computed in float32, and are exact; with ``level=4``, activations become 8-bit whole
    numbers, which is faster and not exact: the module then is `FAST`. Products with codes of 8 bits are taken at level
    4 alone, for the kernel is slow otherwise. One set of codes serves a head and its tied table. What no kernel takes
    stays a `DequantizeLinear`, which ONNX Runtime folds when it loads the model: in memory, it is float32.

    Guarantees: no codes of FLOAT4E2M1, which ONNX Runtime does not read; they become 8-bit whole numbers.
    """

    name: ClassVar[str] = "ort-matmul-nbits"
    phase: ClassVar[Phase] = Phase.LOWER
    changes_weights: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True

    level: Literal[0, 4] = field(default=0, metadata={"help": "0: exact; 4: activations of 8 bits in the products"})

    def established(self) -> frozenset[str]:
        """`FAST`, where products may round."""
        return frozenset({FAST}) if self.level else frozenset()

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Replace all readers of a weight, or none: it would be there twice."""
        for value in list(module.graph.initializers.values()):
            parts = quantized(value.const_value)
            if parts is None:
                continue
            if parts.codes.dtype == ir.DataType.FLOAT4E2M1 and rewriter.rewrite("codes of 8 bits"):
                value.const_value = doubled(value.name or "", parts)
                parts = quantized(value.const_value)
                assert parts is not None
            if not readers_of(value) or self._reason(value, parts) is not None or rewriter.refused:
                continue
            packed = pack(rewriter, value, parts)
            for node in products_of(value):
                rewriter.replace(node, self._product(node, packed, rewriter.at(node)), "MatMulNBits")
            rows = [node for node in readers_of(value) if _indices(node, value) is not None]
            zeros = _zeros_of_rows(rewriter, value, packed) if rows else None
            for node in rows:
                rewriter.replace(node, _rows(node, packed, zeros, rewriter.at(node)), "GatherBlockQuantized")
        rewriter.sweep()
        if rewriter.stats.fired:
            module.model.opset_imports[DOMAIN] = 1

    def sites(self, module: Module) -> list[ir.Node]:
        """All nodes that read a quantized weight."""
        return list(readers_of_codes(module))

    def explain(self, module: Module, site: ir.Node) -> Missed:
        """Why a weight stays a `DequantizeLinear`."""
        value = readers_of_codes(module)[site]
        parts = quantized(value.const_value)
        reason = None if parts is None else self._reason(value, parts)
        return Missed.at(site, f"{value.name} is float32 in memory: {reason or 'the pass did not touch it'}")

    def _reason(self, value: ir.Value, parts: Quantized) -> str | None:
        """Why the weight is not taken, as one clause."""
        products = products_of(value)
        weight = stored(products[0]) if products else None
        inputs = len(parts.shape) - 1 if weight is None else 1 - weight.out_axis
        reason = misfit(parts, inputs)
        if reason is not None:
            return reason
        if products and parts.codes.dtype.bitwidth == 8 and self.level == 0:
            return "the kernel for products with codes of 8 bits is fast with level=4 only"
        other = next((n for n in readers_of(value) if n not in products and _indices(n, value) is None), None)
        if other is not None:
            return f"a {other.op_type} reads it, which has no kernel for codes"
        if any(p.inputs[1] is value for p in products) and any(p.inputs[1] is not value for p in products):
            return "one product reads it as it is, another transposed"
        if weight is not None and not weight.transposed and len(products) < len(readers_of(value)):
            return "rows of its inputs are looked up too"
        return None

    def _product(self, node: ir.Node, weight: Packed, b: OpBuilder) -> ir.Value:
        """``x @ w.T``."""
        return b(
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
            accuracy_level=self.level,
        )


def _indices(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Which rows a node looks up in a weight: along the first axis, each alone."""
    index = operand(node, 1)
    if node.domain or node.inputs[0] is not value or index is None or index is value or index.shape is None:
        return None
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        return index
    single = node.op_type == "GatherND" and node.attributes.get_int("batch_dims", 0) == 0
    return index if single and len(index.shape) and index.shape[-1] == 1 else None


def _zeros_of_rows(rewriter: Rewriter, value: ir.Value, weight: Packed) -> ir.Value:
    """Zeros ``[..., blocks, 1]``, a byte each, as look-ups want them; the codes are those of the products."""
    tensor, sizes = weight.zeros.const_value, weight.scales.shape
    assert tensor is not None and sizes is not None
    shape = (*(int(d) for d in sizes.numpy()), 1)

    def apart() -> Array:
        packed = tensor.numpy()
        if weight.bits == 8:
            return packed.reshape(shape)
        halves = np.stack([packed & 15, packed >> 4], axis=-1)
        return halves.reshape(*packed.shape[:-1], -1)[..., : shape[-2]].reshape(shape)

    name = f"{value.name}.zeros_of_rows"
    return added(rewriter, name, lazy(name, ir.DataType.UINT8, shape, apart), [value])


def _rows(node: ir.Node, weight: Packed, zeros: ir.Value | None, b: OpBuilder) -> ir.Value:
    """The rows that a `Gather` looks up."""
    index, shape = node.inputs[1], weight.codes.shape
    assert index is not None and index.shape is not None and shape is not None
    outer = [int(d) for d in shape.numpy()][1:-2]
    found = b(
        "GatherBlockQuantized",
        weight.codes,
        index,
        b("Unsqueeze", weight.scales, b.const([-1])),
        zeros,
        domain=DOMAIN,
        bits=weight.bits,
        block_size=weight.block,
        gather_axis=0,
        quantize_axis=len(outer) + 2,
        dtype=ir.DataType.FLOAT,
        shape=[*index.shape, *outer, weight.blocks, weight.block],
    )
    axes, padded = len(index.shape) - (node.op_type == "GatherND"), weight.blocks * weight.block
    rows = b("Reshape", found, b.const([*[0] * axes, *outer, padded]))
    if padded == weight.features:
        return rows
    return b("Slice", rows, b.const([0]), b.const([weight.features]), b.const([-1]))
