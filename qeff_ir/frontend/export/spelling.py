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
    """Squeeze no axis that is longer than one, in place: nothing in torch, an error in ONNX.

    The batch is longer than one where it is traced, so that it is never squeezed.
    """
    aten = torch.ops.aten
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target not in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
            continue
        value, *asked = node.args
        shape = value.meta["val"].shape
        axes = range(len(shape)) if not asked else [asked[0]] if isinstance(asked[0], int) else asked[0]
        for axis in sorted({axis % len(shape) for axis in axes if shape}, reverse=True):
            if isinstance(shape[axis], int) and shape[axis] == 1:
                with graph.inserting_before(node):
                    value = call(aten.squeeze.dim, value, axis)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def cut_splits(program: ExportedProgram) -> None:
    """Write each piece of a split as a slice, in place: torch's exporter makes a sequence of the pieces."""
    aten = torch.ops.aten
    graph = program.graph_module.graph
    graph.eliminate_dead_code()  # pieces that nothing reads
    for node in list(graph.nodes):
        if node.target not in (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
            continue
        value, _, *rest = node.args
        axis, start = (rest[0] if rest else 0), 0
        starts: list[int] = []
        for piece in node.meta["val"]:
            starts.append(start)
            start += piece.shape[axis]
        for user in list(node.users):
            begin = starts[user.args[1]]
            with graph.inserting_before(user):
                piece = call(aten.slice.Tensor, value, axis, begin, begin + user.meta["val"].shape[axis])
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
        graph.erase_node(node)


def write_out_bags(program: ExportedProgram) -> None:
    """Write each sum of weighted rows of a table as a lookup and a sum, in place: torch's exporter makes a loop.

    That is where all sums have as many rows, as `torch.nn.functional.embedding_bag` makes of indices with two axes.
    """
    aten = torch.ops.aten
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.embedding_bag.padding_idx:
            continue
        table, indices, starts, _, mode, _, weights, *_ = node.args
        first = next(iter(node.users))
        if starts.target is not aten.arange.start_step or mode != 0 or weights is None or first.args[1] != 0:
            continue
        shape = [-1, starts.args[2]]
        with graph.inserting_before(node):
            rows = call(aten.embedding.default, table, call(aten.reshape.default, indices, shape))
            scales = call(aten.unsqueeze.default, call(aten.reshape.default, weights, shape), -1)
            total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, rows, scales), [1])
        first.replace_all_uses_with(total)
    graph.eliminate_dead_code()


def give_biases(program: ExportedProgram) -> None:
    """Give each convolution over three axes a bias, of zeros, in place: torch's exporter makes one of a wrong shape."""
    aten = torch.ops.aten
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.conv3d.default and (len(node.args) < 3 or node.args[2] is None):
            weight = node.args[1].meta["val"]
            with graph.inserting_before(node):
                zeros = graph.call_function(aten.full.default, ([int(weight.shape[0])], 0.0))
                zeros.meta["val"] = weight.new_empty(int(weight.shape[0]))
            node.args = (*node.args[:2], zeros, *node.args[3:])
