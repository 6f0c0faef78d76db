"""Layers as functions (contract §4.1, ``-sub-functions``): one body a kind of layer, called once a layer.

A layer is what has the same numbered place in its source, ``model.layers.3``. Its weights, its caches and whatever else
comes from outside are arguments; small constants are in the body, where the compiler sees their values. Layers that do
the same with arguments of the same types share a body.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import onnx_ir as ir

from qeff_ir.ir.module import SOURCE_KEY, WEIGHT_KEY
from qeff_ir.ir.sources import sources_of
from qeff_ir.storage import INLINE_BYTES

DOMAIN = "qeff.layers"
"""Domain of the functions."""
_NAME = "DecoderLayer"
_LAYER = re.compile(r"(.*?)\.(\d+)(?:\.|$)")


def outline(model: ir.Model, shared: Collection[str]) -> int:
    """Turn the layers of a model into calls of functions, in place.

    A layer that is left and entered again (something outside reads what it makes, and it reads that) stays as it is, as
    does one that is alone in its list.

    Args:
        model: The model; its functions stay, and are called from inside the new ones.
        shared: Inputs of which masks and rotations are computed, once for all layers.

    Returns:
        How many layers are calls now.
    """
    layers = _layers(model.graph, shared)
    known: dict[Any, ir.Function] = {}
    for nodes in layers:
        _outline(model, nodes, known)
    if known:
        model.opset_imports[DOMAIN] = 1
        model.graph.sort()
    return len(layers)


def _layers(graph: ir.Graph, shared: Collection[str]) -> list[list[ir.Node]]:
    """The nodes of each layer that can be outlined, in the order of the graph."""
    groups: dict[tuple[str, int], list[ir.Node]] = {}
    # What the first layer computes of positions and sizes alone is no part of it: all layers read it.
    own = {v for v in graph.initializers.values() if WEIGHT_KEY in v.metadata_props}
    inputs = set(graph.inputs)
    own |= {v for v in inputs if v.name not in shared}
    for node in graph:
        if not any(v in own for v in node.inputs) or (node.op_type == "Shape" and node.inputs[0] in inputs):
            continue
        own.update(node.outputs)
        layers = {_layer(source) for source in sources_of(node)}
        if len(layers) == 1 and (layer := layers.pop()) is not None:
            groups.setdefault(layer, []).append(node)
    lists = [name for name, _ in groups]
    return [nodes for (name, _), nodes in groups.items() if lists.count(name) > 1 and _is_closed(nodes)]


def _layer(source: str) -> tuple[str, int] | None:
    """The list of layers, and the number of the layer, that a Hugging Face module belongs to."""
    match = _LAYER.match(source)
    return (match[1], int(match[2])) if match is not None else None


def _is_closed(nodes: Sequence[ir.Node]) -> bool:
    """Whether no way leads out of the nodes and back into them."""
    inside = set(nodes)
    seen: set[ir.Node] = set()
    todo = [user for node in nodes for user in node.successors() if user not in inside]
    while todo:
        node = todo.pop()
        if node in inside:
            return False
        if node not in seen:
            seen.add(node)
            todo.extend(node.successors())
    return True


def _outline(model: ir.Model, nodes: Sequence[ir.Node], known: dict[Any, ir.Function]) -> None:
    inside = {v for node in nodes for v in node.outputs}
    outer = [v for node in nodes for v in node.inputs if v is not None and v not in inside]
    constants = [v for v in dict.fromkeys(outer) if _is_constant(v)]
    arguments = [v for v in dict.fromkeys(outer) if not _is_constant(v)]
    members = set(nodes)
    results = [
        v
        for node in nodes
        for v in node.outputs
        if v.is_graph_output() or any(user not in members for user, _ in v.uses())
    ]
    kind = _kind(nodes, arguments, constants, results)
    function = known.get(kind)
    if function is None:
        function = _function(model, f"{_NAME}{len(known)}", nodes, arguments, constants, results)
        known[kind] = function
        model.functions[function.identifier()] = function
    outputs = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in results]
    layer = _layer(sources_of(nodes[0])[0])
    assert layer is not None
    name = ".".join(map(str, layer))
    call = ir.Node(
        DOMAIN,
        function.name,
        arguments,
        outputs=outputs,
        name=name,
        metadata_props={SOURCE_KEY: name},
    )
    model.graph.insert_after(nodes[-1], call)
    for old, new in zip(results, outputs, strict=True):
        for index, value in enumerate(model.graph.outputs):
            if value is old:
                model.graph.outputs[index] = new
        old.replace_all_uses_with(new)
        old.name = None
    model.graph.remove(nodes, safe=True)


def _is_constant(value: ir.Value) -> bool:
    tensor = value.const_value
    known = value.is_initializer() and tensor is not None and not value.is_graph_output()
    return known and WEIGHT_KEY not in value.metadata_props and tensor is not None and tensor.nbytes <= INLINE_BYTES


def _kind(
    nodes: Sequence[ir.Node], arguments: Sequence[ir.Value], constants: Sequence[ir.Value], results: Sequence[ir.Value]
) -> tuple[Any, ...]:
    """Equal for two layers just when one body does for both."""
    place: dict[ir.Value | None, Any] = {None: None}
    place |= {v: ("argument", i) for i, v in enumerate(arguments)}
    for value in constants:
        assert value.const_value is not None
        array = value.const_value
        place[value] = (array.dtype, tuple(array.shape.numpy()), array.tobytes())
    told: list[Any] = [tuple((v.dtype, str(v.shape)) for v in arguments)]
    for index, node in enumerate(nodes):
        place |= {v: (index, i) for i, v in enumerate(node.outputs)}
        attributes = tuple(sorted((a.name, ir.to_proto(a).SerializeToString()) for a in node.attributes.values()))
        told.append((node.op_identifier(), attributes, tuple(place[v] for v in node.inputs), len(node.outputs)))
    return (*told, tuple(place[v] for v in results))


def _function(
    model: ir.Model,
    name: str,
    nodes: Sequence[ir.Node],
    arguments: Sequence[ir.Value],
    constants: Sequence[ir.Value],
    results: Sequence[ir.Value],
) -> ir.Function:
    made = {v: ir.Value(name=f"argument_{i}", shape=v.shape, type=v.type) for i, v in enumerate(arguments)}
    body: list[ir.Node] = []
    for index, value in enumerate(constants):
        constant = ir.node("Constant", [], {"value": value.const_value})
        constant.outputs[0].name = f"constant_{index}"
        made[value] = constant.outputs[0]
        body.append(constant)
    inputs = [made[v] for v in arguments]
    for index, node in enumerate(nodes):
        outputs = [
            ir.Value(name=f"value_{index}" + (f"_{i}" if i else ""), shape=v.shape, type=v.type)
            for i, v in enumerate(node.outputs)
        ]
        made |= dict(zip(node.outputs, outputs, strict=True))
        body.append(
            ir.Node(
                node.domain,
                node.op_type,
                [None if v is None else made[v] for v in node.inputs],
                node.attributes,
                overload=node.overload,
                outputs=outputs,
                name=node.name and f"{node.op_type}_{index}",
            )
        )
    imports = {d: v for d, v in model.opset_imports.items() if d != DOMAIN}
    graph = ir.Graph(inputs, [made[v] for v in results], nodes=body, opset_imports=imports, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
