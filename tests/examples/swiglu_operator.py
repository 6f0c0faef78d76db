# pyright: reportArgumentType=false, reportReturnType=false
"""An operator of a device with the pass that makes it: ``SwiGLU(gate, up) = gate * sigmoid(gate) * up`` as one kernel.

One statement, `define`, makes it known: passes keep it, the AI 100's files have its body, and the emulator its rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript import FLOAT, script
from onnxscript.onnx_opset import opset18 as op
from onnxscript.values import Opset

from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.passing import AllSites, Expect, Pass, Rewriter

DOMAIN = "com.example.kernels"


@script(Opset(DOMAIN, 1), default_opset=op)
def SwiGLU(gate: FLOAT, up: FLOAT) -> FLOAT:  # noqa: N802
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


@script(Opset(DOMAIN, 1), default_opset=op)
def Doubled(gate: FLOAT, up: FLOAT) -> FLOAT:  # noqa: N802
    """Another rule, of a device that is wrong: for the tests."""
    product = op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
    return op.Add(product, product)


operators.define(SwiGLU, rule=SwiGLU)


@dataclass(frozen=True, slots=True)
class FuseSwiGLU(Pass):
    """``Mul(Swish(gate), up)`` becomes `SwiGLU`."""

    name: ClassVar[str] = "fuse-swiglu"
    expect: ClassVar[Expect] = AllSites()

    def sites(self, module: Module) -> list[ir.Node]:
        """Products of a `Swish` that nothing else reads."""
        return [node for node in module.graph if node.op_type == "Mul" and _gate(node) is not None]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Fuse all."""
        for node in self.sites(module):
            gate = _gate(node)
            assert gate is not None
            if rewriter.rewrite("SwiGLU"):
                up = node.inputs[1] if node.inputs[0] is gate.outputs[0] else node.inputs[0]
                rewriter.replace(node, rewriter.at(node)("SwiGLU", gate.inputs[0], up, domain=DOMAIN))
        operators.attach(module.model)


def _gate(node: ir.Node) -> ir.Node | None:
    makers = [value.producer() if value is not None else None for value in node.inputs]
    found = (m for m in makers if m is not None and m.op_type == "Swish" and len(m.outputs[0].uses()) == 1)
    return next(found, None)
