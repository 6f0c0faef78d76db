"""What a model makes from how many tokens there are, and that none of it reaches its answer.

How a prompt is cut into runs, and how long a cache is compiled, must not change an answer. In a traced run both are
sizes, and nearly always they size something: a shape, the bounds of a loop over tokens. They change *numbers* in few
ways, all of which show: a size is given to an operator as a number (``arange``, a factor), a tensor that holds the same
for all tokens is summed over them, or a table is cut by a size. From there the numbers are followed to where they end.
They may end in

* an index of rows of this run, into what these rows hold,
* the distance of two tokens of one run, which is the same wherever the run begins,

and nowhere else: what is computed from the given positions instead is none of them any more
(`qeff_ir.frontend.export.positions`). A model for which that fails is refused. The same goes for what the trace took
for granted: a model's code that asks whether a size is below a number has been traced for sizes that are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.export.example import LIKE, Count, Example, Sizes, number
from qeff_ir.frontend.export.limits import COMPARES, REDUCES
from qeff_ir.frontend.private import changes_arguments

aten = torch.ops.aten

INDEXES: dict[Any, tuple[str, ...]] = {
    aten.index.Tensor: ("indices",),
    aten.index_select.default: ("index",),
    aten.gather.default: ("index",),
    aten.take_along_dim.default: ("indices",),
    aten.embedding.default: ("indices",),
    aten.index_put.default: ("indices",),
    aten.index_put_.default: ("indices",),
    aten.scatter.src: ("index",),
    aten.scatter_.src: ("index",),
    aten.scatter.value: ("index",),
    aten.scatter_.value: ("index",),
    aten.scatter_add.default: ("index",),
    aten.scatter_add_.default: ("index",),
    aten.index_add.default: ("index",),
    aten.index_add_.default: ("index",),
    aten.index_copy.default: ("index",),
    aten.index_copy_.default: ("index",),
}
"""Operators that look up, and the names of the arguments that say where."""

_COMPARES: frozenset[Any] = frozenset(
    getattr(aten, name).Tensor for name in ("sub", "ge", "gt", "le", "lt", "eq", "ne")
)
_MOVES: frozenset[Any] = frozenset(
    {
        aten.unsqueeze.default,
        aten.view.default,
        aten.reshape.default,
        aten.expand.default,
        aten.transpose.int,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.clone.default,
        aten.contiguous.default,
        aten.t.default,
        aten.detach.default,
        aten.alias.default,
    }
)
"""Operators that change no number."""
_TRIANGLES: frozenset[Any] = frozenset({aten.tril.default, aten.triu.default, aten.tril_.default, aten.triu_.default})
_CUTS: frozenset[Any] = frozenset({aten.slice.Tensor, aten.select.int, aten.narrow.default})
_SUMS: frozenset[Any] = frozenset(
    {
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.cumsum.default,
        aten.cumsum_.default,
        aten.logcumsumexp.default,
        aten.count_nonzero.default,
        aten.count_nonzero.dim_IntList,
        aten.nonzero.default,
        aten.argmax.default,
        aten.argsort.default,
        aten.norm.ScalarOpt_dim,
        aten.linalg_vector_norm.default,
    }
)
"""Operators that make how many there are out of what they are."""
_SEVERAL = 4
_LAYOUT = ("int", "List[int]", "Optional[int]", "Optional[List[int]]")
"""Types of arguments that are sizes, axes and bounds."""


def argument(node: Node, name: str) -> Any:
    """What an operator is given for an argument of its schema; `None` where that is its default."""
    operator: Any = node.target
    for index, spec in enumerate(operator._schema.arguments):
        if spec.name == name:
            return node.args[index] if index < len(node.args) else node.kwargs.get(name)
    return None


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return found


class Flow:
    """Which values of a graph flow where.

    Args:
        program: The traced run.
        sizes: Its sizes.
        tokens: Name of the placeholder of the token ids.
        counts: Nodes that stand for themselves, whatever they are made from.
        examples: Two that are small.

    Attributes:
        questions: Where it is asked how long the longest position of a run is, once `refuse_counts` has run.
    """

    def __init__(
        self,
        program: ExportedProgram,
        sizes: Sizes,
        tokens: str,
        counts: Mapping[Node, Count],
        examples: Sequence[Example],
    ) -> None:
        self.graph, self.sizes, self.counts, self.examples = program.graph_module.graph, sizes, counts, examples
        self.questions: list[Node] = []
        users = {sizes.inputs[str(name)] for name in program.graph_signature.user_inputs}
        positions = {node for node in users if node.name == sizes.positions}
        self._held = users - positions
        self._given = set(positions)
        """All that follows from the given positions."""
        self._frame: dict[Node, bool] = {}
        for node in self.graph.nodes:
            self._frame[node] = self.is_frame(node)
            if not self._given.isdisjoint(self.values_of(node)):
                self._given.add(node)

    def values_of(self, node: Node) -> list[Node]:
        """The tensors whose numbers a node reads."""
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | list | tuple)]
        if node.target in LIKE or node.target is torch.ops.qeff.cache_positions.default:
            return [n for n in inputs if n is not node.args[0]]
        return [] if node.target is aten.sym_size.int else inputs

    def is_frame(self, node: Node) -> bool:
        """Whether a value is the same whatever tokens and caches hold."""
        if node not in self._frame:
            held = node in self._held or node.op == "output"
            self._frame[node] = node in self.counts or (not held and all(self._frame[n] for n in self.values_of(node)))
        return self._frame[node]

    def is_local(self, node: Node) -> bool:
        """Whether a node compares two tokens of one run by how far they are apart."""
        if node.target not in _COMPARES:
            return False
        roots = [self._count_of(n) for n in node.args[:2]]
        of = {root.of for root in roots if root is not None}
        return None not in roots and len(of) == 1 and "keys" not in of

    def _count_of(self, value: Any) -> Count | None:
        """The count that a value is, but for its shape."""
        while isinstance(value, Node) and value not in self.counts and (value.target in _MOVES or _whole(value)):
            value = value.args[0]
        return self.counts.get(value) if isinstance(value, Node) else None

    def is_uniform(self, value: Any) -> bool:
        """Whether a value holds one number everywhere."""
        return isinstance(value, Node) and number(value, self.examples[0]) is not None

    def is_row_index(self, node: Node, user: Node) -> bool:
        """Whether a node says no more to its user than which rows to look up in what tokens hold."""
        names = INDEXES.get(user.target)
        if names is None:
            return False
        where = [n for name in names for n in _nodes(argument(user, name))]
        what = [n for n in self.values_of(user) if n not in where]
        return node in where and node not in what and any(not self.is_frame(n) for n in what)

    def refuse_counts(self, name: str) -> None:
        """Check that no number that comes from a size reaches what the run returns.

        Args:
            name: The model's class, for the message.

        Raises:
            UnsupportedModelError: One does.
        """
        output = next(node for node in self.graph.nodes if node.op == "output")
        written: dict[Node, Node] = {}
        while True:
            known = len(written)
            source = self._follow(written).get(output)
            if source is not None and (source.target in _TRIANGLES or source.meta["val"].dtype == torch.bool):
                where = f" in {place(source)}" if source.target not in _TRIANGLES else ""
                raise UnsupportedModelError(
                    f"{name} builds attention masks by itself{where}, so it cannot be told where padding and earlier "
                    "chunks are"
                )
            if source is not None:
                raise UnsupportedModelError(
                    f"{name} counts positions in {place(source)}: it computes with how many tokens are in a run or in "
                    f"the cache ({_said(source)}), where only the positions that are given say the same however a "
                    "prompt is cut; take them from position_ids"
                )
            if len(written) == known:
                return

    def _follow(self, written: dict[Node, Node]) -> dict[Node, Node]:
        """Each node that holds numbers from sizes, and where they come from; notes what is written into others."""
        found = dict(written)
        for node in self.graph.nodes:
            if node.op == "call_function" and self._is_source(node) and not self.is_local(node):
                found.setdefault(node, node)
            if node in found or self.is_local(node):
                continue
            for n in self.values_of(node):
                if n in found and not self._ends(found[n], n, node):
                    found[node] = found[n]
                    break
            if node in found and _writes(node):
                target: Any = node.args[0]
                while isinstance(target, Node) and target.op == "call_function":
                    written.setdefault(target, found[node])
                    target = target.args[0] if target.args else None
        return found

    def _ends(self, source: Node, node: Node, user: Node) -> bool:
        """Whether a number from a size does not get any further than to a user."""
        if self._of_rows(source) and self.is_row_index(node, user):
            return True
        if source.target in REDUCES and user.target in COMPARES and self.is_frame(user):
            self.questions.append(user)
            return True
        return source.target in _CUTS and node is source and self._slopes(node)

    def _slopes(self, node: Node) -> bool:
        """Whether a bias for each slot grows evenly: no softmax sees from where it starts."""
        values = [example.value(node) for example in self.examples]
        if any(v is None or not v.is_floating_point() or v.shape[-1] < _SEVERAL for v in values):
            return False
        steps = [v.diff(dim=-1) for v in values]
        even = all(torch.allclose(s, s[..., :1].expand_as(s)) for s in steps)
        return even and torch.allclose(steps[0][..., 0], steps[1][..., 0])

    def _of_rows(self, source: Node) -> bool:
        """Whether a source numbers the tokens of a run, and says nothing of the cache."""
        return source.target in (aten.arange.default, aten.arange.start, aten.arange.start_step) and all(
            self.sizes.of_run(n.meta["val"]) for n in source.all_input_nodes
        )

    def _is_source(self, node: Node) -> bool:
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            return False
        schema = getattr(node.target, "_schema", None)
        if schema is None or (node.target in LIKE and node.target not in _FILLS):
            return False
        for index, spec in enumerate(schema.arguments):
            value = node.args[index] if index < len(node.args) else node.kwargs.get(spec.name)
            given = [n for n in _nodes(value) if isinstance(n.meta.get("val"), torch.SymInt | torch.SymFloat)]
            counted = any(self.sizes.counted(n.meta["val"]) for n in given)
            if counted and (str(spec.type) not in _LAYOUT or node.target in _TRIANGLES):
                return True
            if counted and node.target in _CUTS and self.is_frame(node) and not self.is_uniform(node.args[0]):
                return True
        if node.target in _TRIANGLES:
            matrix: Any = node.args[0]
            rows, columns = matrix.meta["val"].shape[-2:]
            return (self.sizes.counted(rows) or self.sizes.counted(columns)) and str(rows) != str(columns)
        return (node.target in _SUMS or node.target in REDUCES) and self._sums_tokens(node)

    def _sums_tokens(self, node: Node) -> bool:
        """Whether what is summed tells no more of a token than what kind of id it has."""
        value = node.args[0]
        if not isinstance(value, Node) or not any(self.sizes.counted(n) for n in value.meta["val"].shape):
            return False
        axes = argument(node, "dim")
        rank = value.meta["val"].dim()
        chosen = range(rank) if axes in (None, []) else [axes] if isinstance(axes, int) else axes
        over = [n for axis in chosen if self.sizes.counted(n := value.meta["val"].shape[axis])]
        if value in self._given and all(self.sizes.of_keys(n) for n in over):
            return False  # which slots the given positions see, as a mask does
        return bool(over) and (self.is_frame(value) or self._is_kind(value))

    def _is_kind(self, node: Node) -> bool:
        """Whether a value is made from whole numbers and truths alone, all the way from the tokens' ids."""
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            if current in self._held and current.meta["val"].is_floating_point():
                return False
            value = current.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not self.is_frame(current):
                return False
            new = [n for n in self.values_of(current) if n not in seen]
            seen.update(new)
            todo.extend(new)
        return True


_FILLS: frozenset[Any] = frozenset({aten.full_like.default, aten.new_full.default})


def _whole(node: Node) -> bool:
    """Whether a slice leaves nothing out."""
    return node.target is aten.slice.Tensor and node.args[2:] in ((), (0,), (0, 2**63 - 1))


def _writes(node: Node) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema") and changes_arguments(node.target)


def place(node: Node) -> str:
    """The module whose code a node comes from, as the model names it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = str(stack[-1][0]).removeprefix("hf").lstrip(".") if stack else ""
    return f"'{name}'" if name else "the model itself"


def _said(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]
