"""Two graphs as one: an encoder goes into the graph of what reads it, before that graph's own nodes."""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.ir.module import WEIGHT_KEY


def absorb(graph: ir.Graph, other: ir.Graph, prefix: str) -> dict[str, ir.Value]:
    """Take all nodes of another graph, and the constants that this one does not have.

    Args:
        graph: The graph to add to.
        other: The other one, which is used up: it keeps its inputs, to be replaced by values of `graph`.
        prefix: Beginning of the names of constants whose own name is taken.

    Returns:
        What was the other graph's output, by name.
    """
    made = {str(value.name): value for value in other.outputs}
    for name, value in list(other.initializers.items()):
        del other.initializers[name]
        own = graph.initializers.get(name)
        if own is not None and WEIGHT_KEY in own.metadata_props:  # a weight of both
            value.replace_all_uses_with(own)
            continue
        value.name = name if own is None else f"{prefix}graph.{name}"
        graph.register_initializer(value)
    other.outputs.clear()
    nodes = list(other)
    other.remove(nodes)
    for value in (value for node in nodes for value in node.outputs):
        value.name = None
    for node in nodes:
        node.name = None
    graph.insert_before(next(iter(graph)), nodes)
    return made
