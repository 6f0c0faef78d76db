"""Use ONNX Runtime's own kernels where they save work over the standard form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qeff_ir.module import Module
from qeff_ir.passing.base import Pass, Rewriter, register
from qeff_ir.passing.matching import made_by

ORT_DOMAIN = "com.microsoft"


@register
@dataclass(frozen=True, slots=True)
class OrtKernels(Pass):
    """Select ONNX Runtime kernels: `FusedMatMul` reads a weight as the checkpoint stores it, `QuickGelu` is `Swish`.

    Without the first, the runtime would transpose every weight when it loads the model, and keep both copies.
    """

    name: ClassVar[str] = "ort-kernels"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Replace every product with a transposed weight, and every `Swish`."""
        for node in list(module.graph):
            if node.domain != "":
                continue
            b = rewriter.at(node)
            if node.op_type == "Swish":
                alpha = node.attributes["alpha"].as_float()
                rewriter.replace(node, b("QuickGelu", node.inputs[0], domain=ORT_DOMAIN, alpha=alpha), "QuickGelu")
            elif node.op_type == "MatMul":
                transpose = made_by(node.inputs[1], "Transpose")
                weight = transpose.inputs[0] if transpose is not None else None
                if transpose is None or weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
                    continue
                product = b("FusedMatMul", node.inputs[0], weight, domain=ORT_DOMAIN, transB=1)
                rewriter.replace(node, product, "FusedMatMul")
        rewriter.sweep()
        if rewriter.stats.fired:
            module.model.opset_imports[ORT_DOMAIN] = 1
