"""Types and shapes of one new node, by ONNX's own inference: what a pass need not say of what it makes.

The layers of a model ask the same of it again and again, so answers are kept by operator, attributes and the types of
the inputs; a small constant counts with its numbers, for a `Reshape` is told by them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from qeff_ir.ir import operators
from qeff_ir.ir.module import WEIGHT_KEY

_READ = 32
"""Most numbers of a constant that inference reads; shapes and axes have few."""

Found = tuple[ir.DataType | None, ir.Shape | None]
"""Element type and shape of one output, as far as they can be told."""
_Key = tuple[object, ...]


class Inference:
    """Infers nodes of a graph.

    Args:
        opsets: Version of each domain, as the graph imports them.
    """

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._opsets = dict(opsets)
        self._known: dict[_Key, list[Found]] = {}

    def outputs(self, node: ir.Node) -> list[Found]:
        """What the outputs of a node are; ``(None, None)`` for one of which nothing can be told."""
        nothing: list[Found] = [(None, None)] * len(node.outputs)
        attributes = node.attributes.values()
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or a.is_ref() for a in attributes):
            return nothing
        key = _key(node)
        if key is None:
            return nothing
        if key not in self._known:
            self._known[key] = self._infer(node) or nothing
        return self._known[key]

    def _infer(self, node: ir.Node) -> list[Found] | None:
        names = [f"i{index}" if value is not None else "" for index, value in enumerate(node.inputs)]
        given = [(name, value) for name, value in zip(names, node.inputs, strict=True) if value is not None]
        outputs = [f"o{index}" for index in range(len(node.outputs))]
        proto = onnx.helper.make_node(node.op_type, names, outputs, domain=node.domain)
        proto.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values())
        types = {name: _type(value) for name, value in given}
        try:
            if (node.domain, node.op_type) in operators.known():
                if None in node.inputs:
                    return None  # ONNX counts the types of a function's inputs through, and knows no gap
                function = _body(node.domain, node.op_type)
                found = onnx.shape_inference.infer_function_output_types(function, [*types.values()], proto.attribute)
            else:
                data = {name: ir.serde.serialize_tensor(t) for name, v in given if (t := _numbers(v)) is not None}
                schema = onnx.defs.get_schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
                imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
                inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
                found = [inferred.get(name) for name in outputs]
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
            return None  # an operator of a runtime, or a wrong node: checks tell of those
        return [_found(kind) for kind in found]


@functools.cache
def _body(domain: str, name: str) -> onnx.FunctionProto:
    return operators.known()[domain, name].body.to_function_proto()


def _key(node: ir.Node) -> _Key | None:
    """What an answer depends on; `None` where an input has no type."""
    inputs: list[object] = []
    for value in node.inputs:
        if value is None:
            inputs.append(None)
            continue
        if value.dtype is None:
            return None
        numbers = _numbers(value)
        dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        inputs.append((value.dtype, dims, None if numbers is None else numbers.tobytes()))
    attributes = tuple((a.name, str(a.value)) for a in node.attributes.values())
    return (*node.op_identifier(), len(node.outputs), attributes, tuple(inputs))


def _numbers(value: ir.Value) -> ir.TensorProtocol | None:
    """The numbers of a small constant of whole numbers."""
    tensor = value.const_value
    if tensor is None or WEIGHT_KEY in value.metadata_props or value.is_graph_input():
        return None
    return tensor if tensor.size <= _READ and tensor.dtype.is_integer() else None


def _type(value: ir.Value) -> onnx.TypeProto:
    assert value.dtype is not None
    shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return onnx.helper.make_tensor_type_proto(value.dtype.value, shape)


def _found(kind: onnx.TypeProto | None) -> Found:
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.elem_type:
        return None, None
    tensor = kind.tensor_type
    dtype = ir.DataType(tensor.elem_type)
    if not tensor.HasField("shape"):
        return dtype, None
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
    return dtype, ir.Shape(sizes)
