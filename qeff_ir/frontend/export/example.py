"""What a part of a traced run computes on an example, without the rest of the model: how a count is told.

The example is a run as transformers has it: the cache holds ``past`` tokens when it begins, and the slots end with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qeff_ir.frontend.private import symbols_of, with_sizes

aten = torch.ops.aten

LIKE: frozenset[Any] = frozenset(
    getattr(aten, name).default
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
)
"""Ops that look at no more than the size of their first argument."""

_BATCH = 2
_MOST = 1 << 22
"""Numbers in a tensor that is still worth computing."""


class Sizes:
    """What each symbol of a traced run is the size of.

    Attributes:
        run: Symbols of the tokens of this run.
        past: The symbol of the tokens before it.
        keys: Symbols of the slots of caches, and the first input that has each.
        positions: Name of the placeholder of the positions.
    """

    def __init__(
        self, program: ExportedProgram, tokens: str, positions: str, counted: str, given: Sequence[str] = ()
    ) -> None:
        self.inputs = {node.name: node for node in program.graph_module.graph.nodes if node.op == "placeholder"}
        self.batch: set[Any] = set()
        self.run: set[Any] = set()
        self.past: set[Any] = set()
        self.keys: dict[Any, Node] = {}
        self.positions = positions
        for name in program.graph_signature.user_inputs:
            node = self.inputs[str(name)]
            if name in given:
                continue
            shape = [symbols_of(size) for size in node.meta["val"].shape]
            if name == counted:
                self.past |= shape[0]
                continue
            self.batch |= shape[0]
            if name in (tokens, positions):
                self.run |= shape[1]
            else:
                self.keys |= {symbol: node for axis in shape[1:] for symbol in axis if symbol not in self.keys}

    def counted(self, size: Any) -> bool:
        """Whether a size depends on how many tokens there are in a run or in a cache."""
        return not symbols_of(size).isdisjoint(self.run | self.past | set(self.keys))

    def of_keys(self, size: Any) -> bool:
        """Whether a size is that of the slots of a cache alone."""
        return bool(symbols_of(size)) and symbols_of(size) <= set(self.keys)

    def is_batch(self, size: Any) -> bool:
        """Whether a size is that of the batch."""
        return self.per_row(size) == 1

    def per_row(self, size: Any) -> int | None:
        """How many times the batch a size is; `None` if it is no multiple of it alone."""
        if not symbols_of(size) or not symbols_of(size) <= self.batch:
            return None
        sizes = {batch: with_sizes(size, dict.fromkeys(self.batch, batch)) for batch in (_BATCH, 3 * _BATCH)}
        times = {number / batch for batch, number in sizes.items()}
        return int(*times) if len(times) == 1 and float(*times).is_integer() else None

    def of_run(self, size: Any) -> bool:
        """Whether a size says nothing of what was before the run, and nothing of a cache."""
        return symbols_of(size) <= self.run | self.batch

    def at(self, size: Any, run: int, past: int) -> int:
        """A size in a run of `run` tokens after `past` ones."""
        return with_sizes(size, self._known(run, past))

    def true(self, question: Any, run: int, past: int, keys: int) -> bool:
        """Whether a comparison of sizes holds in a run of `run` tokens after `past` ones, with `keys` slots."""
        return bool(question.subs({**self._known(run, past), **dict.fromkeys(self.keys, keys)}))

    def _known(self, run: int, past: int) -> dict[Any, int]:
        known = {**dict.fromkeys(self.batch, _BATCH), **dict.fromkeys(self.run, run), **dict.fromkeys(self.past, past)}
        return {**known, **dict.fromkeys(self.keys, past + run)}


@dataclass(frozen=True)
class Count:
    """A tensor that counts up by one along an axis.

    Attributes:
        axis: Along which.
        of: ``positions`` of the tokens of the run, ``keys`` (positions of the tokens in the slots of a cache), or
            ``rows`` (of the run itself, whatever was before it).
        first: What it is at the first of these.
    """

    axis: int
    of: str
    first: int


class Example:
    """Values of nodes for random tokens, computed when asked for.

    Args:
        program: The traced run.
        sizes: Its sizes.
        tokens: Name of the placeholder of the token ids.
        run: Tokens of the run.
        past: Tokens before it.
        positions: Name of the placeholder of the positions, if what follows from them is to be known as well.
    """

    def __init__(
        self, program: ExportedProgram, sizes: Sizes, tokens: str, run: int, past: int, positions: str | None = None
    ) -> None:
        self.sizes, self.run, self.past = sizes, run, past
        generator = torch.Generator().manual_seed(run)
        signature = program.graph_signature
        held = {**program.state_dict, **program.constants}
        buffers = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self.values: dict[Node, Any] = {
            node: held.get(buffers[name]) for name, node in sizes.inputs.items() if name in buffers
        }
        self.values[sizes.inputs[tokens]] = torch.randint(3, 50, (_BATCH, run), generator=generator)
        if positions is not None:
            self.values[sizes.inputs[positions]] = torch.arange(past, past + run).expand(_BATCH, -1)
        self.unknown: set[Node] = set()

    def value(self, node: Node) -> Any:
        """What a node is here; `None` if that takes more than sizes, tokens and constants, or too much memory."""
        if node in self.unknown:
            return None
        try:
            with torch.no_grad():
                return self._value(node)
        except Exception:  # whatever an operator raises that is given the sizes of another example
            self.unknown.add(node)
            return None

    def _value(self, node: Node) -> Any:
        if node in self.values:
            return self.values[node]
        if node in self.unknown or node.op != "call_function":
            raise LookupError(node.name)
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt):
            self.values[node] = self.sizes.at(known, self.run, self.past)
            return self.values[node]
        if isinstance(known, torch.Tensor) and self._numbers(known) > _MOST:
            raise LookupError(node.name)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self._argument(n, node))
        self.values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        return self.values[node]

    def _argument(self, node: Node, user: Node) -> Any:
        if user.target in LIKE and node is user.args[0]:
            known = node.meta["val"]
            return torch.empty([self.sizes.at(n, self.run, self.past) for n in known.shape], dtype=known.dtype)
        if node in self.unknown:
            raise LookupError(node.name)
        return self._value(node)

    def _numbers(self, tensor: torch.Tensor) -> int:
        product = 1
        for size in tensor.shape:
            product *= self.sizes.at(size, self.run, self.past)
        return product


def find_count(node: Node, examples: list[Example]) -> Count | None:
    """What a node counts, if it counts the same on all examples that tell."""
    value = node.meta.get("val")
    sizes = examples[0].sizes
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool or value.is_complex():
        return None
    axes = [axis for axis, size in enumerate(value.shape) if sizes.counted(size)]
    rest = [size for axis, size in enumerate(value.shape) if axis not in axes]
    if len(axes) != 1 or not all(size == 1 or sizes.is_batch(size) for size in rest):
        return None
    found: list[set[tuple[str, int]]] = []
    for example in examples:
        numbers = example.value(node)
        if numbers is None or not numbers.numel():
            continue
        rows = numbers.movedim(axes[0], -1).reshape(-1, numbers.shape[axes[0]]).double()
        first = rows[0, 0].item()
        if first != int(first) or not bool((rows == torch.arange(rows.shape[1]) + first).all()):
            return None
        length, start = rows.shape[1], int(first)
        found.append(
            {("positions", start - example.past), ("rows", start)}
            if length == example.run
            else {("keys", start)}
            if length == example.run + example.past
            else set()
        )
    # One example tells nothing of what the others would change.
    same = set.intersection(*found) if len(found) > 1 else set[tuple[str, int]]()
    return Count(axes[0], *min(same)) if same else None


def number(node: Node, example: Example) -> float | None:
    """What a tensor holds everywhere, if that is one number."""
    value = example.value(node)
    if not isinstance(value, torch.Tensor) or not value.numel():
        return None
    return value.flatten()[0].item() if bool((value == value.flatten()[0]).all()) else None


def depends_on_values(node: Node) -> bool:
    """Whether a tensor is made from more than sizes and numbers."""
    sizes = (*LIKE, aten.sym_size.int)
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if current.op == "placeholder":
            return True
        new = [n for n in current.all_input_nodes if n not in seen and current.target not in sizes]
        seen.update(new)
        todo.extend(new)
    return False
