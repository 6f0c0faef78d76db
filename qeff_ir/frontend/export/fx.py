"""Changes to a traced graph that keep its example values true, from which shapes are read."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from qeff_ir.frontend.private import python_dispatcher


def call(function: Any, first: Node, *rest: Any) -> Node:
    """A new node, with its example value."""
    made = first.graph.call_function(function, (first, *rest))
    made.meta = dict(first.meta)
    update(made)
    return made


def follow(nodes: list[Node]) -> None:
    """Bring the shapes of nodes up to date, and of all that follows from them, in the graph's order."""
    changed: set[Node] = set()
    for node in nodes[0].graph.nodes if nodes else ():
        if (node in nodes or not changed.isdisjoint(node.all_input_nodes)) and update(node):
            changed.add(node)


def update(node: Node) -> bool:
    """Compute a node's example value anew; whether its shape changed."""
    before = node.meta.get("val")
    if node.op != "call_function":
        return False
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    inputs = (tensor for n in node.graph.nodes if n.op == "placeholder" for tensor in _tensors(n.meta["val"]))
    mode = next((t.fake_mode for t in inputs if isinstance(t, FakeTensor)), contextlib.nullcontext())
    with mode, python_dispatcher(), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    after = node.meta["val"]
    return [t.shape for t in _tensors(before)] != [t.shape for t in _tensors(after)]


def _tensors(value: Any) -> list[torch.Tensor]:
    """A tensor, or all tensors of a list."""
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]
