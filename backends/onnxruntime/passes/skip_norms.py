"""Let ONNX Runtime add a residual and normalize the sum in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import made_by, operand

from .kernels import ORT_DOMAIN

_KERNELS = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}


@register
@dataclass(frozen=True, slots=True)
class OrtSkipNorms(Pass):
    """Fuse ``Norm(a + b)`` over ``[batch, seq, features]`` into one kernel that returns the sum too.

    The sum is the residual that a layer goes on with. It is the same number as before, for the kernel is given two
    summands and no bias: one of a layer stays its own `Add`, in the order in which an adapter's branch joins it.
    """

    name: ClassVar[str] = "ort-skip-norms"
    phase: ClassVar[Phase] = Phase.LOWER
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Fuse what can be; report why the rest cannot."""
        order = {node: number for number, node in enumerate(module.graph)}
        for node in self.sites(module):
            problem = _problem(node, order)
            if problem is not None:
                rewriter.missed(node, problem)
            elif rewriter.rewrite(_KERNELS[node.op_type]):
                _fuse(node, rewriter)
        rewriter.sweep()
        if rewriter.stats.fired:
            module.model.opset_imports[ORT_DOMAIN] = 1

    def sites(self, module: Module) -> list[ir.Node]:
        """The first norm of each sum."""
        norms = [n for n in module.graph if n.domain == "" and n.op_type in _KERNELS]
        sums = [(made_by(n.inputs[0], "Add"), n) for n in norms]
        first: dict[ir.Node, ir.Node] = {}
        for added, norm in sums:
            if added is not None:
                first.setdefault(added, norm)
        return list(first.values())


def _problem(node: ir.Node, order: Mapping[ir.Node, int]) -> str | None:
    """Why the kernel cannot stand for a sum and its norm, or `None` when it can; `order` of the nodes before."""
    added = made_by(node.inputs[0], "Add")
    assert added is not None
    shapes = [value.shape if value is not None else None for value in (*added.inputs, *node.inputs[1:])]
    if any(shape is None for shape in shapes):
        return "a shape is not known"
    left, right, *rows = (list(shape.dims) for shape in shapes if shape is not None)
    if len(left) != 3 or left != right:
        return "the summands are not of one shape, [batch, seq, features]"
    if any(row != left[-1:] for row in rows):
        return "scale or bias are not one number for each feature"
    if node.attributes.get_int("axis", -1) not in (-1, 2) or len(node.outputs) > 1:
        return "more than the features are normalized, or mean and deviation are read"
    if node.attributes.get_int("stash_type", 1) != 1:
        return "the norm is computed in another type"
    # The scale may be computed behind the sum (as one plus a weight), so the kernel stands where the norm does.
    if any(order.get(reader, -1) < order[node] for reader in added.outputs[0].consumers() if reader is not node):
        return "something else reads the sum first"
    if any(v is None or v.dtype != ir.DataType.FLOAT for v in (*added.inputs, node.inputs[1])):
        return "the type is not float32"
    return None


def _fuse(node: ir.Node, rewriter: Rewriter) -> None:
    added = made_by(node.inputs[0], "Add")
    assert added is not None
    parameters = [node.inputs[1], operand(node, 2)] if node.op_type == "LayerNormalization" else [node.inputs[1]]
    kernel = ir.node(
        _KERNELS[node.op_type],
        [*added.inputs, *parameters],
        {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
        domain=ORT_DOMAIN,
        num_outputs=4,
    )
    rewriter.insert(kernel, node)
    normal, mean, deviation, total = kernel.outputs
    for value in kernel.outputs:
        value.type, value.shape = node.outputs[0].type, node.outputs[0].shape
    for value in (mean, deviation):  # nothing reads them
        value.shape = ir.Shape([*list(added.outputs[0].shape or ())[:-1], 1])
    rewriter.substitute(node, normal)
    rewriter.substitute(added, total)
