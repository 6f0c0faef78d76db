"""Weights of 16 bits in ONNX files: a `Cast` makes them the float32 that the graph computes with.

In memory, a module has the float32 tensor alone (`qeff_ir.ranges.widened`): no pass meets a `Cast`. What opens the file
converts the weights once, when it is loaded; the numbers are the same, for each of 16 bits has one in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np
import onnx_ir as ir

from qeff_ir.ranges import narrow, widened

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""Element types all of whose numbers float32 has too."""

_KEY = "qeff.widened"
"""In the metadata of a `Cast` that `spell` has made."""
_SUFFIX = ".float32"
"""Ending of what it returns: the weight keeps its own name."""


def spell(model: ir.Model) -> None:
    """Give the widened initializers of the main graph the numbers of their source and a `Cast`, in place."""
    graph, casts = model.graph, list[ir.Node]()
    with in_order(graph):
        for name, value in list(graph.initializers.items()):
            source, known_outside = narrow(value.const_value), value.is_graph_input() or value.is_graph_output()
            if source is None or source.dtype not in HALVES or value.dtype != ir.DataType.FLOAT or known_outside:
                continue
            del graph.initializers[name]
            stored = ir.val(name, source.dtype, value.shape, const_value=source)
            stored.metadata_props.update(value.metadata_props)
            graph.initializers[name] = stored
            value.const_value, value.name = None, name + _SUFFIX
            value.metadata_props.clear()
            cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, outputs=[value])
            cast.metadata_props[_KEY] = ""
            casts.append(cast)
    put_first(graph, casts)


def fold(model: ir.Model) -> None:
    """Undo `spell`, in place. A node that only says so stays as it is."""
    graph = model.graph
    with in_order(graph):
        for node in list(graph):
            value = _spelled(node)
            if value is not None and value.const_value is not None:
                put_back(node, _wide(value.const_value, str(value.name)))


def forget(model: ir.Model) -> None:
    """Let the widened initializers be float32 and nothing else, in place: files get copies of them."""
    for value in model.graph.initializers.values():
        wide = value.const_value
        if narrow(wide) is not None and isinstance(wide, ir.LazyTensor):
            numbers = ir.LazyTensor(lambda wide=wide: ir.tensor(wide.numpy()), wide.dtype, wide.shape, name=wide.name)
            value.const_value = numbers


@contextlib.contextmanager
def in_order(graph: ir.Graph) -> Generator[None]:
    """Keep the order of the initializers while the block takes some out and puts others of the same names in."""
    names = list(graph.initializers)
    yield
    for name in names:
        if name in graph.initializers:
            graph.initializers[name] = graph.initializers.pop(name)


def put_first(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Put nodes that read initializers alone before all others."""
    first = next(iter(graph), None)
    if first is None:
        graph.extend(nodes)
    else:
        graph.insert_before(first, nodes)


def put_back(node: ir.Node, numbers: ir.LazyTensor) -> None:
    """Put one float32 initializer in the place of a node and all that it reads, by the name of the first of them."""
    graph, stored = node.graph, node.inputs[0]
    assert isinstance(graph, ir.Graph) and stored is not None and stored.name
    for value in node.inputs:
        assert value is not None and value.name
        graph.initializers.pop(value.name)
    made = ir.val(stored.name, ir.DataType.FLOAT, stored.shape, const_value=numbers)
    made.metadata_props.update(stored.metadata_props)
    graph.initializers[stored.name] = made
    ir.convenience.replace_all_uses_with(node.outputs[0], made, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _spelled(node: ir.Node) -> ir.Value | None:
    """The weight of 16 bits that a node makes float32."""
    if _KEY not in node.metadata_props or node.op_type != "Cast" or node.domain or len(node.inputs) != 1:
        return None
    value = node.inputs[0]
    if value is None or not value.is_initializer() or value.const_value is None or len(value.uses()) != 1:
        return None
    fits = value.const_value.dtype in HALVES and node.attributes.get_int("to", 0) == ir.DataType.FLOAT
    return value if fits and value.name and not value.is_graph_output() else None


def _wide(source: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.Tensor(source.numpy().astype(np.float32), name=name)

    return widened(ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(source.shape.numpy()), name=name), source)
