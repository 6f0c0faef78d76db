"""What a part of a traced run computes on an example, without the rest of the model: how its meaning is told."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

_LIKE: dict[Any, int] = {torch.ops.aten.zeros_like.default: 0, torch.ops.aten.ones_like.default: 1}
"""Ops that look at the size of what they are given, and what they fill it with."""

_SEQ, _BATCH, _SLOTS = 5, 2, 11


class Example:
    """Values of nodes for random tokens, computed when asked for."""

    def __init__(self, program: ExportedProgram, tokens: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.values: dict[Node, Any] = {}
        signature = program.graph_signature
        held = {**program.state_dict, **program.constants}
        buffers = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        inputs = {node.name: node for node in program.graph_module.graph.nodes if node.op == "placeholder"}
        rows, columns = (str(size) for size in inputs[tokens].meta["val"].shape)
        self.sizes = {rows: _BATCH, columns: _SEQ}
        for node in inputs.values():
            if node.name == tokens:
                self.values[node] = torch.randint(3, 50, (_BATCH, _SEQ), generator=generator)
            elif node.name in signature.user_inputs:  # only its size can count
                self.values[node] = torch.zeros(self._shape(node), dtype=node.meta["val"].dtype)
            elif node.name in buffers:
                self.values[node] = held.get(buffers[node.name])

    def _shape(self, node: Node) -> list[int]:
        return [size if isinstance(size, int) else self.sizes.get(str(size), _SLOTS) for size in node.meta["val"].shape]

    def count(self, node: Node) -> int | None:
        """The first number of every row, if the rows count up from it by one."""
        try:
            with torch.no_grad():
                value = self._value(node)
        except Exception:
            return None
        if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            return None
        if value.dim() not in (1, 2) or value.shape[-1] != _SEQ:
            return None
        first = int(value.reshape(-1)[0])
        return first if bool((value == torch.arange(_SEQ) + first).all()) else None

    def number(self, node: Node) -> float | None:
        """What a tensor holds everywhere, if that is one number."""
        try:
            value = self._value(node)
        except Exception:
            return None
        return value.flatten()[0].item() if value.numel() and bool((value == value.flatten()[0]).all()) else None

    def measures(self, node: Node) -> bool:
        """Whether a table holds the distance of each token of the run to each slot of a cache."""
        if node.meta["val"].is_floating_point() or node.meta["val"].dim() != 2:
            return False
        try:
            value = self._value(node)
        except Exception:
            return False
        rows, columns = torch.arange(_SEQ), torch.arange(_SLOTS)
        return torch.equal(value, rows[:, None] - columns[None, :])

    def _value(self, node: Node) -> Any:
        if node not in self.values and node.target in _LIKE:
            self.values[node] = torch.full(self._shape(node), _LIKE[node.target])
        if node not in self.values:
            if node.op != "call_function":
                raise LookupError(node.name)
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._value)
            self.values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        return self.values[node]


def depends_on_values(node: Node) -> bool:
    """Whether a tensor is made from more than sizes and numbers."""
    sizes = (*_LIKE, torch.ops.aten.sym_size.int)
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if current.op == "placeholder":
            return True
        new = [n for n in current.all_input_nodes if n not in seen and current.target not in sizes]
        seen.update(new)
        todo.extend(new)
    return False
