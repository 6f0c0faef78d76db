"""What torch's exporter has no ONNX form for, or a wrong one, written with what it has."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from qeff_ir.frontend.export.fx import call


def spell_out_complex(program: ExportedProgram) -> None:
    """Add axes to complex tensors through their real form, ``[..., 2]``, in place."""
    aten = torch.ops.aten
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.unsqueeze.default or not node.meta["val"].is_complex():
            continue
        value, axis = node.args
        rank = value.meta["val"].dim()
        steps = [
            (aten.view_as_real.default, ()),
            (aten.unsqueeze.default, (axis if axis >= 0 else axis + rank + 1,)),
            (aten.view_as_complex.default, ()),
        ]
        with graph.inserting_before(node):
            for function, arguments in steps:
                value = call(function, value, *arguments)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def drop_idle_squeezes(program: ExportedProgram) -> None:
    """Take out each squeeze of an axis that is longer than one, in place: nothing in torch, an error in ONNX."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            value, axis = node.args
            size = value.meta["val"].shape[axis] if value.meta["val"].dim() else 1
            if isinstance(size, int) and size != 1:
                node.replace_all_uses_with(value)
                graph.erase_node(node)
