"""Arithmetic of 16 bits on a CPU: each node is computed in float32, and its result is rounded to the declared type.

So the sums inside a matrix product are float32, as torch has them on a CPU. ONNX Runtime by itself computes float16
nodes in float32 too, but leaves out the rounding between some; it has no bfloat16 kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from backends.ai100 import sub_functions
from qeff_ir.errors import PackageError
from qeff_ir.ir.sources import source_text
from qeff_ir.passing.inference import Inference
from qeff_ir.widening import HALVES

_FLOAT = ir.DataType.FLOAT
_EXACT = frozenset(
    {
        "Concat", "CtxGather", "CtxGatherBlockedKV", "CtxGatherBlockedKVCB", "CtxGatherCB", "CtxGatherCB3D",
        "CtxScatter", "CtxScatterCB", "CtxScatterCB3D", "Expand",
        "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split",
        "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators that move numbers: what was rounded stays so."""


def declared_type(proto: onnx.ModelProto) -> ir.DataType:
    """The type that activations of a model have: of 16 bits where there is any."""
    graph = proto.graph
    types = {t.data_type for t in graph.initializer} | {v.type.tensor_type.elem_type for v in graph.input}
    types |= {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    return next((half for half in sorted(HALVES) if half.value in types), _FLOAT)


def spell_out(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model in float32 that rounds where another one has 16 bits.

    Args:
        proto: The model; weights stay references.

    Raises:
        PackageError: The type of what a node makes is not known.
    """
    model = ir.from_proto(proto)
    common.InlinePass(criteria=lambda function: function.domain == sub_functions.DOMAIN)(model)
    graph, inference = model.graph, Inference(model.opset_imports)
    nodes = list(graph)
    for node in nodes:
        _complete(node, inference)
    for value in graph.inputs:
        if value.dtype in HALVES:
            value.type = ir.TensorType(_FLOAT)
    for value in [v for v in graph.initializers.values() if v.dtype in HALVES]:
        users = list(value.uses())
        cast = ir.node("Cast", [value], {"to": _FLOAT})
        graph.insert_before(nodes[0], cast)
        for user, index in users:
            user.replace_input_with(index, cast.outputs[0])
    for node in nodes:
        for value in [v for v in node.outputs if v.dtype in HALVES]:
            assert value.dtype is not None
            _round(graph, node, value, value.dtype)
    return ir.to_proto(model)


def _complete(node: ir.Node, inference: Inference) -> None:
    """Infer types that the file does not say; those inside functions, say."""
    if all(value.dtype is not None for value in node.outputs):
        return
    for value, (dtype, _) in zip(node.outputs, inference.outputs(node), strict=True):
        if value.dtype is None and dtype is not None:
            value.type = ir.TensorType(dtype)
        if value.dtype is None and value.uses():
            raise PackageError(
                f"the type of '{value.name}' of {source_text(node) or 'the model itself'} is not known, so that it "
                "cannot be rounded: compile the model again without dtype"
            )


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, half: ir.DataType) -> None:
    """Let a node make float32 in place of a half, and round it."""
    value.type = ir.TensorType(_FLOAT)  # of its own: copies of a layer share theirs
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", _FLOAT.value)
    elif node.op_type in _EXACT:
        return
    users = list(value.uses())
    down = ir.node("Cast", [value], {"to": half})
    up = ir.node("Cast", [down.outputs[0]], {"to": _FLOAT})
    graph.insert_after(node, [down, up])
    rounded = up.outputs[0]
    rounded.dtype, rounded.shape, down.outputs[0].dtype = _FLOAT, value.shape, half
    for user, index in users:
        user.replace_input_with(index, rounded)
    if value.is_graph_output():
        outputs: Sequence[ir.Value] = graph.outputs
        place = next(i for i, output in enumerate(outputs) if output is value)
        name, value.name = value.name, f"{value.name}.exact"
        graph.outputs[place] = rounded
        rounded.name = name
