"""Bring a graph into the form that all other passes match: folded, inlined, without duplicates or dead code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from qeff_ir import dialect
from qeff_ir.module import Module
from qeff_ir.passing.base import Pass, Rewriter, register
from qeff_ir.passing.hiding import LARGE
from qeff_ir.passing.matching import same_size


@register
@dataclass(frozen=True, slots=True)
class Canonicalize(Pass):
    """Fold constants, inline helper functions, merge equal nodes, drop what nothing uses (onnxscript's optimizer).

    Guarantees: no `Identity` between nodes, no constant subgraph, one initializer per constant, constant reshape
    targets wherever the shapes are known. Weights are never folded: they stay references.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Optimize in place; see the class."""
        if not rewriter.rewrite("optimize"):
            return
        before = len(module.graph)
        # The optimizer inlines every function it finds; the dialect has to survive as ops.
        for key in [k for k in module.model.functions if k[0] == dialect.DOMAIN]:
            del module.model.functions[key]
        for _ in range(2):
            with rewriter.hidden_weights():
                optimizer.optimize_ir(module.model, output_size_limit=LARGE // 4)
            rewriter.adopt()
            for node in module.graph:
                if node.op_type == "Reshape" and node.domain == "":
                    _fix_reshape(node, rewriter)
            rewriter.sweep()
        dialect.attach(module.model)
        rewriter.stats.fired["removed"] = before - len(module.graph)


def _fix_reshape(node: ir.Node, rewriter: Rewriter) -> None:
    """Replace a computed target by a constant one: 0 keeps an axis, one unknown axis becomes -1."""
    data, target = node.inputs
    out = node.outputs[0].shape
    if data is None or target is None or target.const_value is not None or out is None or data.shape is None:
        return
    dims: list[int] = []
    for axis, dim in enumerate(out):
        if isinstance(dim, int):
            dims.append(dim)
        elif axis < len(data.shape) and same_size(data.shape[axis], dim) and -1 not in dims:
            dims.append(0)
        elif -1 not in dims:
            dims.append(-1)
        else:
            return
    if 0 in [d for d, o in zip(dims, out, strict=True) if isinstance(o, int)]:
        return
    if rewriter.rewrite("constant reshape"):
        node.replace_input_with(1, rewriter.constant(np.asarray(dims, dtype=np.int64)))
        node.attributes.pop("allowzero", None)
