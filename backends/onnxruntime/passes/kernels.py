"""Use ONNX Runtime's own kernels where they save work over the standard form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect
from qeff_ir.passing.matching import made_by

ORT_DOMAIN = "com.microsoft"


@register
@dataclass(frozen=True, slots=True)
class OrtKernels(Pass):
    """Select ONNX Runtime kernels: `FusedMatMul` reads a weight as the checkpoint stores it, `QuickGelu` is `Swish`.

    Without the first, the runtime would transpose every weight when it loads the model, and keep both copies.
    """

    name: ClassVar[str] = "ort-kernels"
    phase: ClassVar[Phase] = Phase.LOWER
    expect: ClassVar[Expect] = AllSites()
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Replace every product with a transposed weight, and every `Swish`."""
        for node in self.sites(module):
            b = rewriter.at(node)
            if node.op_type == "Swish":
                alpha = node.attributes.get_float("alpha", 1.0)
                rewriter.replace(node, b("QuickGelu", node.inputs[0], domain=ORT_DOMAIN, alpha=alpha), "QuickGelu")
            else:
                product = b("FusedMatMul", node.inputs[0], _transposed(node), domain=ORT_DOMAIN, transB=1)
                rewriter.replace(node, product, "FusedMatMul")
        rewriter.sweep()
        if rewriter.stats.fired:
            module.model.opset_imports[ORT_DOMAIN] = 1

    def sites(self, module: Module) -> list[ir.Node]:
        """Products with a weight that is stored the other way round, and every `Swish`."""
        standard = (node for node in module.graph if node.domain == "")
        return [node for node in standard if node.op_type == "Swish" or _transposed(node) is not None]


def _transposed(node: ir.Node) -> ir.Value | None:
    """The weight that a product takes transposed, if it is one, or several that stand side by side."""
    transpose = made_by(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
    weight = transpose.inputs[0] if transpose is not None else None
    beside = made_by(weight, "Concat")
    parts = [weight] if beside is None else beside.inputs
    stored = all(part is not None and part.is_initializer() and len(part.shape or ()) == 2 for part in parts)
    return weight if stored else None
