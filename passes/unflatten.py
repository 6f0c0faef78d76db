"""Take linear layers out of the flattened form ``[batch * seq, features]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Rewriter, register
from qeff_ir.passing.matching import constant, made_by, same_size


@register
@dataclass(frozen=True, slots=True)
class Unflatten(Pass):
    """Turn ``reshape -> Gemm -> reshape`` into ``MatMul + Add`` on ``[batch, seq, features]``.

    The reshapes compute ``batch * seq`` at run time, and hide the token axis from passes that look for it.
    """

    name: ClassVar[str] = "unflatten"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Rewrite every reshape that undoes the flattening of a Gemm's input."""
        for node in self.sites(module):
            gemm = made_by(node.inputs[0], "Gemm")
            flat = made_by(gemm.inputs[0], "Reshape") if gemm is not None else None
            assert gemm is not None and flat is not None
            problem = _problem(flat, gemm, node)
            if problem is not None:
                rewriter.missed(node, problem)
                continue
            b = rewriter.at(node)
            data = flat.inputs[0]
            assert data is not None and data.shape is not None
            if len(data.shape) != 3:
                data = b("Reshape", data, b.const([0, 0, constant(flat.inputs[1])[1]]))
            product = b("MatMul", data, gemm.inputs[1])
            if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
                product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
                product = b("Add", product, gemm.inputs[2])
            rewriter.replace(node, product, "Gemm")
        rewriter.sweep()

    def sites(self, module: Module) -> list[ir.Node]:
        """Reshapes of a Gemm over something reshaped."""
        found: list[ir.Node] = []
        for node in module.graph:
            gemm = made_by(node.inputs[0], "Gemm") if node.op_type == "Reshape" else None
            if gemm is not None and made_by(gemm.inputs[0], "Reshape") is not None:
                found.append(node)
        return found


def _width(data: ir.Value) -> int | None:
    """Number of features of ``[batch, seq, ...]``, if known."""
    sizes = data.shape.dims[2:] if data.shape is not None else ()
    known = [d for d in sizes if isinstance(d, int)]
    return math.prod(known) if len(known) == len(sizes) else None


def _problem(flat: ir.Node, gemm: ir.Node, back: ir.Node) -> str | None:
    """Why this chain is not a plain linear layer, or `None` when it is."""
    data, out = flat.inputs[0], back.outputs[0]
    target = constant(flat.inputs[1])
    if data is None or data.shape is None or out.shape is None or len(data.shape) < 3 or len(out.shape) != 3:
        return "the values around the linear layer have no axes for batch and tokens"
    if not isinstance(target, list) or len(target) != 2 or target[0] != -1 or target[1] != _width(data):
        return "the flattening merges other axes than batch and tokens"
    if not all(same_size(data.shape[axis], out.shape[axis]) for axis in (0, 1)):
        return "batch and tokens are not restored"
    factors = [gemm.attributes[k].value for k in ("alpha", "beta") if k in gemm.attributes]
    transposed = [gemm.attributes[k].value for k in ("transA", "transB") if k in gemm.attributes]
    return "the Gemm scales or transposes" if any(f != 1.0 for f in factors) or any(transposed) else None
