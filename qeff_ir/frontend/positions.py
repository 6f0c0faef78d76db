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

from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qeff_ir.frontend.aligning import align
from qeff_ir.frontend.example import Example, depends_on_values
from qeff_ir.frontend.fx import call, follow

_LOOKUPS: dict[Any, int] = {
    torch.ops.aten.embedding.default: 1,
    torch.ops.aten.index_select.default: 2,
    torch.ops.aten.index.Tensor: 1,
}
"""Which argument of a lookup is the index."""


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
    examples = [Example(program, tokens, seed) for seed in (1, 2)]
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


def _ancestors(node: Node) -> set[Node]:
    """All whose values a node is made from; a size is no value, whosever it is."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in found and current.target is not torch.ops.aten.sym_size.int:
            found.add(current)
            todo.extend(current.all_input_nodes)
    return found


def _index_by(node: Node, place: int, start: Node, offset: int) -> None:
    """Give a lookup the index ``start + offset``, and bring the shapes of all that follows up to date."""
    index = start
    with node.graph.inserting_before(node):
        if offset:
            index = call(torch.ops.aten.add.Tensor, start, offset)
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
    follow([node])


def _take_number(node: Node, example: Example) -> bool:
    """Let a lookup in what holds one number everywhere (kinds of tokens, where all are text) be that number."""
    if node.target is not torch.ops.aten.index.Tensor or not isinstance(node.args[0], Node):
        return False
    indices = cast("list[Node | None]", node.args[1])
    if len(indices) != node.args[0].meta["val"].dim() or depends_on_values(node.args[0]):
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
            shaped = call(torch.ops.aten.add.Tensor, shaped, index)
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
        rows = call(aten.unsqueeze.default, positions, 2)
        made = call(aten.sub.Tensor, rows, call(aten.unsqueeze.default, slots, 1))
    node.replace_all_uses_with(made)
    align(made, inputs)
    follow(list(made.users))
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
        rows = call(aten.unsqueeze.default, call(aten.clamp.default, positions, 0, last), 2)
        columns = call(aten.unsqueeze.default, call(aten.clamp.default, slots, 0, last), 1)
        made = call(aten.index.Tensor, call(aten.view.default, table, [last + 1, last + 1]), [rows, columns])
        while made.meta["val"].dim() < node.meta["val"].dim():
            made = call(aten.unsqueeze.default, made, 1)
    node.replace_all_uses_with(made)
    follow(list(made.users))
    return True


def _slots(node: Node, positions: Node, inputs: list[Node]) -> Node | None:
    """The position in each slot of a cache that is as long as a node's last axis."""
    length = str(node.meta["val"].shape[-1])
    past = next((n for n in inputs if n.meta["val"].dim() == 4 and str(n.meta["val"].shape[2]) == length), None)
    return None if past is None else call(torch.ops.qeff.cache_positions.default, past, positions)


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
