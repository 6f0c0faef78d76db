"""Positions that a model counts for itself: from the traced run on, the given positions stand in their place.

Some models take no positions. They count (``arange(seq) + length of the cache``, or the tokens that are no padding)
and compute with the count: look it up in a table, take the distances to the slots of a cache, scale by it. Which values
are counts is not guessed from names: they are measured on examples (`qeff_ir.frontend.export.example`). What follows
from a count and from nothing that a token or a cache holds is then computed anew from the given positions.

A count is the same for all rows of a batch, positions are not. So the model's own operators compute one row, a batch of
one, and `torch.vmap` makes the batch of it: whatever they are, what was ``[seq, ...]`` or ``[1, seq, ...]`` becomes
``[batch, seq, ...]``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.export.counts import Flow
from qeff_ir.frontend.export.example import Count, Example, Sizes, depends_on_values, find_count, number
from qeff_ir.frontend.export.fx import call, follow, update
from qeff_ir.frontend.export.limits import asked_of_positions, asked_of_sizes
from qeff_ir.frontend.private import python_dispatcher, symbols_of

aten = torch.ops.aten

_EXAMPLES = ((5, 6), (7, 3), (6, 1_000_003))
"""Tokens of a run, and before it; the last is beyond whatever a model clamps or wraps its counts at."""
_END = 2**63 - 1


def give_positions(
    program: ExportedProgram, tokens: str, positions: str, counted: str, name: str, given: Sequence[str] = ()
) -> tuple[int, int | None]:
    """Let what follows from a count follow from the given positions, in place.

    A table that is looked up by given positions and keeps a row for padding starts behind that row, as fairseq's do.

    Args:
        program: A traced run.
        tokens: Name of the placeholder of the token ids, ``[batch, seq]``.
        positions: Name of the placeholder of the positions, ``[batch, seq]``.
        counted: Name of the placeholder whose size is the number of tokens that the cache says that it holds; nothing
            reads it afterwards.
        name: The model's class, for messages.
        given: Names of further placeholders, whose sizes tell nothing of tokens and caches.

    Returns:
        How many nodes now use positions where they used a count, and the longest context that the trace holds for
        (`None`: any).

    Raises:
        UnsupportedModelError: A count reaches what the run returns all the same (`Flow.refuse_counts`).
    """
    graph = program.graph_module.graph
    sizes = Sizes(program, tokens, positions, counted, given)
    _drop_checks(graph)
    examples = [Example(program, sizes, tokens, run, past) for run, past in _EXAMPLES]
    flow = Flow(program, sizes, tokens, {}, examples[:2])
    changed = 0
    for node in list(graph.nodes):
        if not _take_number(node, examples[0]):
            changed += _skip_padding_row(node, sizes.inputs[tokens], sizes.inputs[positions])
            _cut_by_index(node, flow)
    counts = _first_counts(graph.nodes, examples)
    flow = Flow(program, sizes, tokens, counts, examples[:2])
    region = _region(graph.nodes, flow)
    edges = _edges(region, flow)
    if edges:
        changed += _Rows(examples[0], sizes.inputs[positions], counts, list(region)).give(edges)
        graph.eliminate_dead_code()
    flow = Flow(program, sizes, tokens, counts, examples[:2])
    flow.refuse_counts(name)
    limits = [asked_of_sizes(program, sizes, name)]
    if flow.questions:
        limits.append(asked_of_positions(flow.questions, program, sizes, tokens, positions))
    _drop_count(sizes, positions, counted)
    return changed, min((limit for limit in limits if limit is not None), default=None)


def _drop_checks(graph: torch.fx.Graph) -> None:
    """Take out what only checks sizes and types while torch runs a graph."""
    for node in reversed(list(graph.nodes)):
        if "_assert" in str(node.target) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _first_counts(nodes: Iterable[Node], examples: list[Example]) -> dict[Node, Count]:
    """Counts, each where it first is one: whatever a model does with it then (clamp it, say) stays as it is."""
    counts: dict[Node, Count] = {}
    above: dict[Node, frozenset[str]] = {}
    for node in nodes:
        known = frozenset[str]().union(*(above.get(n, frozenset()) for n in node.all_input_nodes))
        if node.op == "call_function" and "positions" not in known:
            found = find_count(node, examples)
            if found is not None and found.of not in known:
                counts[node] = found
                known |= {found.of}
        above[node] = known
    return counts


def _region(nodes: Iterable[Node], flow: Flow) -> dict[Node, None]:
    """All that follows from counts, without what tokens or caches hold; not how far two tokens of a run are apart."""
    region: dict[Node, None] = {}
    for node in nodes:
        follows = any(n in flow.counts or n in region for n in flow.values_of(node))
        if follows and node not in flow.counts and flow.is_frame(node) and not flow.is_local(node):
            region[node] = None
    return region


def _edges(region: dict[Node, None], flow: Flow) -> list[tuple[Node, Node]]:
    """Where what follows from a count is used with what tokens or caches hold."""
    rows = {n for n, count in flow.counts.items() if count.of == "rows"}
    for node in region:
        rows |= {node} if all(n in rows for n in flow.values_of(node) if n in region or n in flow.counts) else set()
    return [
        (node, user)
        for node in [*flow.counts, *region]
        for user in node.users
        if user not in region and user not in flow.counts and not flow.is_local(user) and node in flow.values_of(user)
        if not (node in rows and flow.is_row_index(node, user))
    ]


class _Rows:
    """The part of a graph that follows from counts, computed for each row by the given positions."""

    def __init__(self, example: Example, positions: Node, counts: dict[Node, Count], region: list[Node]) -> None:
        self.example, self.positions, self.counts = example, positions, counts
        self.sizes = sizes = example.sizes
        self.graph = positions.graph
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.nodes = sorted([*counts, *region], key=order.__getitem__)
        inputs = [n for node in region for n in node.all_input_nodes if n not in set(self.nodes)]
        tensors = [n for n in dict.fromkeys(inputs) if isinstance(n.meta.get("val"), torch.Tensor)]
        self.batched = [n for n in tensors if n.meta["val"].dim() and sizes.is_batch(n.meta["val"].shape[0])]
        self.plain = [n for n in tensors if n not in self.batched]

    def give(self, edges: list[tuple[Node, Node]]) -> int:
        """Let each edge start at the value by the given positions; how many nodes then read another one."""
        made = self._trace(list(dict.fromkeys(node for node, _ in edges)))
        changed: dict[Node, None] = {}
        for node, user in edges:
            with self.graph.inserting_before(user):
                placed = _placed(made[node], node, user, self.example)
            if placed is not None:
                user.replace_input_with(node, placed)
                changed[user] = None
        follow(list(changed))
        return len(changed)

    def _trace(self, wanted: list[Node]) -> dict[Node, Node]:
        """The wanted values with one more axis before all others, for the batch."""
        pasts = list(dict.fromkeys(self.sizes.keys.values()))
        with self.graph.inserting_before(self.nodes[0]):
            run = call(aten.sym_size.int, self.positions, 1)
            lengths = [call(aten.sym_size.int, past, 2) for past in pasts]
            slots = [self._slots(past) for past in pasts]
        rows = [self.positions, *slots, *self.batched]
        whole = [run, *lengths, *self.plain]

        def one_row(*given: Any) -> list[torch.Tensor]:
            values = dict(zip([*rows, *whole], given, strict=True))
            made: dict[Node, Any] = {n: values[n] for n in whole}
            size = dict.fromkeys(self.sizes.run, values[run]) | dict.fromkeys(self.sizes.batch, 1)
            size |= {symbol: values[lengths[pasts.index(past)]] for symbol, past in self.sizes.keys.items()}
            size |= {symbol: values[lengths[0]] - values[run] for symbol in self.sizes.past if lengths}

            def known(node: Node) -> Any:
                if node in self.batched:
                    return values[node].unsqueeze(0)
                if node not in made and node.target is aten.sym_size.int:
                    (symbol,) = symbols_of(node.meta["val"])
                    made[node] = size[symbol]
                elif node not in made:
                    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known)
                    made[node] = cast("Any", node.target)(*args, **kwargs)
                return made[node]

            for index, node in enumerate(self.nodes):
                with fx_traceback.annotate({"before": index}):
                    if node not in self.counts:
                        known(node)
                        continue
                    count = self.counts[node]
                    past = self._slots_of(node, count)
                    row = values[self.positions] if past is None else values[slots[pasts.index(past)]]
                    row = row + count.first if count.first else row
                    shape = [-1 if axis == count.axis else 1 for axis in range(node.meta["val"].dim())]
                    made[node] = row.reshape(shape).to(node.meta["val"].dtype)
            return [made[node] for node in wanted]

        axes = (*[0] * len(rows), *[None] * len(whole))
        arguments = [n.meta["val"] for n in (*rows, *whole)]
        fake = self.positions.meta["val"].fake_mode
        with fake, python_dispatcher(), torch.no_grad(), fx_traceback.preserve_node_meta():
            traced = make_fx(torch.vmap(one_row, in_dims=axes))(*arguments)
        if not symbols_of(self.positions.meta["val"].shape[0]):
            raise UnsupportedModelError("a model's count of positions cannot be made one for each row")
        traced.graph.eliminate_dead_code()
        return dict(zip(wanted, self._insert(traced.graph, [*rows, *whole]), strict=True))

    def _slots(self, past: Node) -> Node:
        """The position in each slot of a cache, ``[batch, slots]``.

        Targets may know the same row for the whole batch, ``[1, slots]``. Masks do not mind, what follows here may
        reshape it: zeros of each row keep the batch.
        """
        slots = call(torch.ops.qeff.cache_positions.default, past, self.positions)
        first = call(aten.slice.Tensor, self.positions, 1, 0, 1)
        return call(aten.add.Tensor, slots, call(aten.sub.Tensor, first, first))

    def _slots_of(self, node: Node, count: Count) -> Node | None:
        """The cache whose slots a node counts; `None` where it counts tokens of the run."""
        if count.of != "keys":
            return None
        symbols = symbols_of(node.meta["val"].shape[count.axis])
        pasts = list(self.sizes.keys.values())
        return next((past for symbol, past in self.sizes.keys.items() if symbol in symbols), pasts[0])

    def _insert(self, traced: torch.fx.Graph, inputs: list[Node]) -> list[Node]:
        """Copy a graph, each node to where what it stands for is, and behind what it reads; its results."""
        copies: dict[Node, Node] = {}
        places: dict[Node, int] = {}
        given = iter(inputs)
        for node in traced.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "call_function":
                at = (node.meta.get("custom") or {}).get("before", 0)
                at = places[node] = max([at, *(places.get(n, 0) for n in node.all_input_nodes)])
                with self.graph.inserting_before(self.nodes[at]):
                    copies[node] = self.graph.node_copy(node, copies.__getitem__)
                copies[node].meta["nn_module_stack"] = self.nodes[at].meta.get("nn_module_stack")
        results = next(node for node in traced.nodes if node.op == "output").args[0]
        return [copies[node] for node in cast("list[Node]", results)]


def _placed(made: Node, node: Node, user: Node, example: Example) -> Node | None:
    """A value with an axis for the batch, where `user` has the batch; `None` where that is not told."""
    sizes, shape, rank = example.sizes, node.meta["val"].shape, node.meta["val"].dim()
    others = [n.meta["val"].dim() for n in user.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if rank == max([rank, *others]):
        if shape[0] == 1 or sizes.per_row(shape[0]) == 1:
            return call(aten.squeeze.dim, made, 1)
        return call(aten.flatten.using_ints, made, 0, 1) if _row_by_row(node, example) else None
    pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ())
    if not pointwise or (rank and sizes.per_row(shape[0])):
        return None
    for _ in range(max(others) - rank - 1):
        made = call(aten.unsqueeze.default, made, 1)
    return made


def _row_by_row(node: Node, example: Example) -> bool:
    """Whether the first axis of a value has all of the first row of the batch, then all of the next."""
    each = example.sizes.per_row(node.meta["val"].shape[0])
    value = example.value(node) if each else None
    if value is None:
        return False
    rows = value.unflatten(0, (-1, each))
    return bool((rows == rows[:1]).all())


def _drop_count(sizes: Sizes, positions: str, counted: str) -> None:
    """Let shapes that are those of the tokens before a run be those of all slots but the last ones."""
    for node in list(sizes.inputs[counted].users):
        with node.graph.inserting_before(node):
            past = next(iter(sizes.keys.values()), None)
            if past is None:
                continue
            slots = call(aten.sym_size.int, past, 2)
            run = call(aten.sym_size.int, sizes.inputs[positions], 1)
            rest = call(operator.sub, slots, run)
        node.replace_all_uses_with(rest)
        node.graph.erase_node(node)


def _skip_padding_row(node: Node, tokens: Node, positions: Node) -> bool:
    """Let a table that given positions look up start behind its row for padding."""
    if node.target is not aten.embedding.default or len(node.args) < 3:
        return False
    index, padding = cast("Node", node.args[1]), cast("int", node.args[2])  # -1: none
    reached = _ancestors(index)
    if padding < 0 or positions not in reached or tokens in reached:
        return False
    with node.graph.inserting_before(node):
        node.update_arg(1, call(aten.add.Tensor, index, padding + 1))
    return True


def _ancestors(node: Node) -> set[Node]:
    """All whose values a node is made from; a size is no value, whosever it is."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in found and current.target is not aten.sym_size.int:
            found.add(current)
            todo.extend(current.all_input_nodes)
    return found


def _cut_by_index(node: Node, flow: Flow) -> None:
    """Let a piece that is cut out of a table at sizes be looked up by a count, and know one operator that looks up."""
    if node.target is aten.index_select.default:
        source, axis, where = node.args
        node.target, node.args = aten.index.Tensor, (source, [*[None] * cast("int", axis), where])
    if node.target is not aten.slice.Tensor or not flow.is_frame(node) or flow.is_uniform(node.args[0]):
        return
    bounds = [node.args[i] if len(node.args) > i else None for i in (2, 3)]
    if not any(isinstance(b, Node) and flow.sizes.counted(b.meta["val"]) for b in bounds):
        return
    starts = [
        flow.sizes.at(b.meta["val"] if isinstance(b, Node) else b or 0, *e) for b in bounds[:1] for e in _EXAMPLES
    ]
    if len({s - past for s, (_, past) in zip(starts, _EXAMPLES, strict=True)}) > 1 and len({*starts}) > 1:
        return
    table, axis = cast("Node", node.args[0]), cast("int", node.args[1] if len(node.args) > 1 else 0)
    length = table.meta["val"].shape[axis]
    if table.meta["val"].dtype == torch.bool and not _is_square(table):  # rows and columns may mean anything
        return
    if len(node.args) > 4 and node.args[4] != 1:
        return
    start, end = bounds
    if start in (None, 0) and _only_looked_up(node, axis):
        node.replace_all_uses_with(table)
        return
    with node.graph.inserting_before(node):
        size: Any = length if isinstance(length, int) else call(aten.sym_size.int, table, axis)
        start = _from_start(start or 0, size, node)
        end = size if end in (None, _END) else _from_start(end, size, node)
        index = node.graph.call_function(aten.arange.start, (start, end), {"dtype": torch.int64})
        index.meta = dict(node.meta)
        update(index)
        if isinstance(length, int):  # a slot that holds nothing is beyond all tables
            index = call(aten.clamp.default, index, 0, length - 1)
        looked = call(aten.index.Tensor, table, [*[None] * axis, index])
    node.replace_all_uses_with(looked)
    follow(list(looked.users))


def _is_square(table: Node) -> bool:
    """Whether a table, or what it was looked up in before, has as many rows as columns."""
    while table.target is aten.index.Tensor or table.target is aten.slice.Tensor:
        table = cast("Node", table.args[0])
    shape = table.meta["val"].shape
    return len(shape) > 1 and bool(shape[-1] == shape[-2])


def _from_start(bound: Any, size: Any, node: Node) -> Any:
    """A bound of a slice that counts from the start, whichever end it was told from."""
    at = bound.meta["val"] if isinstance(bound, Node) else bound
    if not at < 0:
        return bound
    if isinstance(bound, Node) or isinstance(size, Node):
        first, second = (size, bound) if isinstance(size, Node) else (bound, size)
        return call(operator.add, first, second)
    return size + bound


def _only_looked_up(node: Node, axis: int) -> bool:
    """Whether a piece of a table does no more than to be looked up, so that the table does as well."""

    def looks_up(user: Node) -> bool:
        if user.target is aten.index.Tensor:
            first, *rest = cast("list[Node | None]", user.args[1])
            return user.args[0] is node and axis == 0 and first is not None and first is not node and not any(rest)
        if user.target is aten.embedding.default:
            return user.args[0] is node and axis == 0 and user.args[1] is not node
        return user.target is aten.index_select.default and user.args[:2] == (node, axis)

    return all(looks_up(user) for user in node.users)


def _take_number(node: Node, example: Example) -> bool:
    """Let a lookup in what holds one number everywhere (kinds of tokens, where all are text) be that number."""
    indices = _indices_of_all_axes(node)
    if not indices or depends_on_values(cast("Node", node.args[0])):
        return False
    same = number(cast("Node", node.args[0]), example)
    if same is None:
        return False
    with node.graph.inserting_before(node):
        shaped = indices[0]
        for index in indices[1:]:
            shaped = call(aten.add.Tensor, shaped, index)
        made = node.graph.call_function(aten.full_like.default, (shaped, same), {"dtype": node.meta["val"].dtype})
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return True


def _indices_of_all_axes(node: Node) -> list[Node]:
    """The indices whose shape a lookup has; none for what is no lookup, or keeps an axis as it is."""
    if not node.args or not isinstance(node.args[0], Node):
        return []
    if node.target is aten.gather.default:
        return [cast("Node", node.args[2])]
    if node.target is not aten.index.Tensor:
        return []
    given = [index for index in cast("list[Node | None]", node.args[1]) if index is not None]
    return given if len(given) == node.args[0].meta["val"].dim() else []
