"""Positions that a model counts for itself: from the traced run on, the given positions stand in their place.

Some models take no positions. They count (``arange(seq) + length of the cache``, or the tokens that are no padding)
and look the count up in a table, or take the distances between the tokens of a run and the slots of a cache. Which
values these are is not guessed from names: they are computed on an example, without the rest of the model. An index is
a count if it gives ``c, c + 1, ...`` in every row, whatever the tokens are; a table is one of distances if it holds
``i - j`` in row ``i`` and column ``j``; a stored mask is one of truths ``[positions, positions]`` that is cut to the
size of a run.

A count is the same for all rows of a batch, positions are not: what was ``[seq, ...]`` becomes ``[batch, seq, ...]``.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Node

_LOOKUPS: dict[Any, int] = {
    torch.ops.aten.embedding.default: 1,
    torch.ops.aten.index_select.default: 2,
    torch.ops.aten.index.Tensor: 1,
}
"""Which argument of a lookup is the index."""

_LIKE: dict[Any, int] = {torch.ops.aten.zeros_like.default: 0, torch.ops.aten.ones_like.default: 1}
"""Ops that look at the size of what they are given, and what they fill it with."""

_SEQ, _BATCH, _SLOTS = 5, 2, 11


def give_positions(program: ExportedProgram, tokens: str, positions: str) -> int:
    """Let lookups by a count, distances and stored masks be those of the given positions, in place.

    A table that is looked up by given positions and keeps a row for padding starts behind that row, as fairseq's do.

    Args:
        program: A traced run.
        tokens: Name of the placeholder of the token ids, ``[batch, seq]``.
        positions: Name of the placeholder of the positions, ``[batch, seq]``.

    Returns:
        How many nodes were changed.
    """
    graph = program.graph_module.graph
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    examples = [_Example(program, tokens, seed) for seed in (1, 2)]
    changed = 0
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sub.Tensor and all(example.measures(node) for example in examples):
            changed += _measure(node, inputs[positions], list(inputs.values()))
        if node.target is torch.ops.aten.slice.Tensor and (table := _stored_mask(node)) is not None:
            changed += _look_up_mask(node, table, inputs[positions], list(inputs.values()))
        place = _LOOKUPS.get(node.target)
        if place is None or _take_number(node, examples[0]):
            continue
        index = node.args[place]
        index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
        if not isinstance(index, Node):
            continue
        reached = _ancestors(index)
        if inputs[positions] in reached:
            # The padding index is the third argument of an embedding; -1 means none.
            offset = int(node.args[2]) + 1 if place == 1 and len(node.args) > 2 and inputs[tokens] not in reached else 0
            start = index
        else:
            counted = [example.count(index) for example in examples]
            if counted[0] is None or counted[0] != counted[1]:
                continue
            offset, start = counted[0], inputs[positions]
        if offset or start is not index:
            _index_by(node, place, start, offset)
            changed += 1
    return changed


class _Example:
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


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo.extend(current.all_input_nodes)
    return found


def _index_by(node: Node, place: int, start: Node, offset: int) -> None:
    """Give a lookup the index ``start + offset``, and bring the shapes of all that follows up to date."""
    index = start
    with node.graph.inserting_before(node):
        if offset:
            index = _call(torch.ops.aten.add.Tensor, start, offset)
    old = node.args[place]
    was = old[0] if isinstance(old, (list, tuple)) else old
    batch_gained = isinstance(was, Node) and was.meta["val"].dim() < index.meta["val"].dim()
    axis = node.args[1]
    axis_is_first = place == 1 or axis == 0
    if node.target is torch.ops.aten.index_select.default and isinstance(axis, int):  # which takes one axis only
        node.target = torch.ops.aten.index.Tensor
        node.args = (node.args[0], [*[None] * axis, index])
    else:
        node.update_arg(place, [index] if isinstance(old, (list, tuple)) else index)
    if batch_gained and axis_is_first:
        _put_batch_first(node, node)
    _follow([node])


def _depends_on_values(node: Node) -> bool:
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


def _take_number(node: Node, example: _Example) -> bool:
    """Let a lookup in what holds one number everywhere (kinds of tokens, where all are text) be that number."""
    if node.target is not torch.ops.aten.index.Tensor or not isinstance(node.args[0], Node):
        return False
    indices = cast("list[Node | None]", node.args[1])
    if len(indices) != node.args[0].meta["val"].dim() or _depends_on_values(node.args[0]):
        return False
    number = example.number(node.args[0])
    if number is None:
        return False
    given = [index for index in indices if index is not None]
    if len(given) != len(indices):
        return False
    with node.graph.inserting_before(node):
        shaped = given[0]
        for index in given[1:]:
            shaped = _call(torch.ops.aten.add.Tensor, shaped, index)
        made = node.graph.call_function(
            torch.ops.aten.full_like.default, (shaped, number), {"dtype": node.meta["val"].dtype}
        )
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return True


def _measure(node: Node, positions: Node, inputs: list[Node]) -> bool:
    """Take distances from the positions of the tokens to those in the slots of a cache of the same length."""
    aten = torch.ops.aten
    with node.graph.inserting_before(node):
        slots = _slots(node, positions, inputs)
        if slots is None:
            return False
        rows = _call(aten.unsqueeze.default, positions, 2)
        made = _call(aten.sub.Tensor, rows, _call(aten.unsqueeze.default, slots, 1))
    _put_batch_first(node, made)
    _follow(list(made.users))
    return True


def _stored_mask(node: Node) -> Node | None:
    """The table of truths, ``[1, ..., positions, positions]``, that a node cuts a piece out of, ``[..., seq, ctx]``."""
    table = node
    while table.target is torch.ops.aten.slice.Tensor and isinstance(table.args[0], Node):
        table = table.args[0]
    value = table.meta["val"]
    if table.op != "placeholder" or value.dtype != torch.bool or value.dim() < 2 or value.shape[-1] != value.shape[-2]:
        return None
    cut = [not isinstance(size, int) for size in node.meta["val"].shape[-2:]]
    return table if all(cut) and value.numel() == value.shape[-1] ** 2 else None


def _look_up_mask(node: Node, table: Node, positions: Node, inputs: list[Node]) -> bool:
    """Take the rows of the tokens' positions, and the columns of those in the slots of a cache, ``[batch, 1, ...]``."""
    aten = torch.ops.aten
    last = int(table.meta["val"].shape[-1]) - 1
    with node.graph.inserting_before(node):
        slots = _slots(node, positions, inputs)
        if slots is None:
            return False
        rows = _call(aten.unsqueeze.default, _call(aten.clamp.default, positions, 0, last), 2)
        columns = _call(aten.unsqueeze.default, _call(aten.clamp.default, slots, 0, last), 1)
        made = _call(aten.index.Tensor, _call(aten.view.default, table, [last + 1, last + 1]), [rows, columns])
        while made.meta["val"].dim() < node.meta["val"].dim():
            made = _call(aten.unsqueeze.default, made, 1)
    node.replace_all_uses_with(made)
    _follow(list(made.users))
    return True


def _slots(node: Node, positions: Node, inputs: list[Node]) -> Node | None:
    """The position in each slot of a cache that is as long as a node's last axis."""
    length = str(node.meta["val"].shape[-1])
    past = next((n for n in inputs if n.meta["val"].dim() == 4 and str(n.meta["val"].shape[2]) == length), None)
    return None if past is None else _call(torch.ops.qeff.cache_positions.default, past, positions)


def _call(function: Any, first: Node, *rest: Any) -> Node:
    """A new node, with its example value."""
    made = first.graph.call_function(function, (first, *rest))
    made.meta = dict(first.meta)
    _update(made)
    return made


def _put_batch_first(node: Node, made: Node) -> None:
    """Let `made`, ``[batch, ...]``, stand for `node`, ``[...]``; axes that are put before it are the batch's."""
    rank = node.meta["val"].dim()
    for user in list(node.users):
        if _puts_first(user, rank):
            for later in list(user.users):
                if _puts_first(later, rank + 1):
                    later.args = (made, 1)
                else:
                    later.replace_input_with(user, made)
        elif node is not made:
            user.replace_input_with(node, made)


def _puts_first(node: Node, rank: int) -> bool:
    return node.target is torch.ops.aten.unsqueeze.default and node.args[1] in (0, -rank - 1)


def _follow(nodes: list[Node]) -> None:
    """Bring the shapes of nodes up to date, and of all that follows from them, in the graph's order."""
    changed: set[Node] = set()
    for node in nodes[0].graph.nodes if nodes else ():
        if (node in nodes or not changed.isdisjoint(node.all_input_nodes)) and _update(node):
            changed.add(node)


def _update(node: Node) -> bool:
    """Compute a node's example value anew; whether its shape changed."""
    before = node.meta.get("val")
    if node.op != "call_function":
        return False
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    examples = [tensor for n in node.all_input_nodes for tensor in _tensors(n.meta["val"])]
    mode = next((e.fake_mode for e in examples if isinstance(e, FakeTensor)), contextlib.nullcontext())
    with mode, torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    after = node.meta["val"]
    return [t.shape for t in _tensors(before)] != [t.shape for t in _tensors(after)]


def _tensors(value: Any) -> list[torch.Tensor]:
    """A tensor, or all tensors of a list."""
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]
