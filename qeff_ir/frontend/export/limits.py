"""How long a context a trace holds for.

A model's code may ask how many tokens there are, and do something else from some number on: grow a table, take other
rotary frequencies. The trace knows what it did for few. Where the code asked for a size, torch noted the question;
where it asked for the longest position of a run, the question is in the graph. Up to the first number that would have
been answered otherwise the trace is right, whatever a prompt is cut into; beyond it, an answer would depend on the cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import Node
from transformers import PreTrainedModel

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend import private
from qeff_ir.frontend.export.example import Example, Sizes

aten = torch.ops.aten

_MOST = 1 << 30
COMPARES: frozenset[Any] = frozenset(
    getattr(getattr(aten, name), kind) for name in ("ge", "gt", "le", "lt") for kind in ("Scalar", "Tensor")
)
"""Operators that ask whether a number is below another."""
REDUCES: frozenset[Any] = frozenset({aten.max.default, aten.amax.default, aten.max.dim})
"""Operators that find the longest position of a run."""


def asked_of_sizes(program: ExportedProgram, sizes: Sizes, name: str) -> int | None:
    """The longest context for which a size would have been answered the same; `None` if there is no end.

    Args:
        program: A traced run.
        sizes: Its sizes.
        name: The model's class, for the message.

    Raises:
        UnsupportedModelError: The answer for a single token is another one already.
    """
    limits: list[int] = []
    for expression in private.questions(program, sizes.run | sizes.past):
        if expression.free_symbols <= sizes.run | sizes.past | set(sizes.keys) and _has_number(expression):
            # The first token, the last one, and all at once.
            most = _largest(lambda n, e=expression: all(sizes.true(e, *cut, n) for cut in ((1, 0), (1, n - 1), (n, 0))))
            if most is None:
                raise UnsupportedModelError(
                    f"{name} counts positions: it does one thing for runs of few tokens and another for longer ones, "
                    f"so its answer would depend on how a prompt is cut ({expression})"
                )
            limits.append(most)
    return min((n for n in limits if n < _MOST), default=None)


def _has_number(expression: Any) -> bool:
    """Whether sizes are compared with a number; whether one is below another is about shapes that must fit."""
    return any(abs(int(n)) > 1 for n in expression.atoms(sympy.Integer))


def asked_of_positions(nodes: list[Node], program: ExportedProgram, sizes: Sizes, tokens: str, positions: str) -> int:
    """The longest context for which comparisons of a run's longest position all stay what they are at the first."""

    def answers(length: int) -> list[Any]:
        example = Example(program, sizes, tokens, 1, length - 1, positions=positions)
        return [example.value(node) for node in nodes]

    first = answers(1)
    if any(answer is None for answer in first):
        return 0
    return _largest(lambda n: all(torch.equal(a, b) for a, b in zip(answers(n), first, strict=True))) or 0


def _largest(holds: Callable[[int], bool]) -> int | None:
    """The largest number up to `_MOST` for which something holds, if it then holds no more; `None` if for none."""
    low = next((1 << power for power in range(30, -1, -1) if holds(1 << power)), None)
    if low is None or low == _MOST:
        return low
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@contextlib.contextmanager
def plain_rotary(model: PreTrainedModel) -> Generator[int | None]:
    """Let rotary frequencies that grow with the length be what they are up to the original one.

    Yields:
        The original length, which the context must not exceed; `None` where nothing grows.
    """
    saved: list[tuple[Any, str, Any]] = []
    limits: list[int] = []

    def put(table: Any, name: str, value: Any) -> None:
        saved.append((table, name, table[name]))
        table[name] = value

    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer: dict[str, Any] = kinds if isinstance(kinds, dict) else {"": kinds}
        grow = [layer for layer, kind in by_layer.items() if isinstance(kind, str) and "dynamic" in kind]
        original = getattr(module, "original_max_seq_len", None)
        if not grow or not isinstance(original, int):
            continue
        limits.append(original)
        plain = {layer: "default" if layer in grow else kind for layer, kind in by_layer.items()}
        put(vars(module), "rope_type", plain if isinstance(kinds, dict) else plain[""])
        buffers = private.tensor_tables(module)[1]
        for prefix in (f"{layer}_" if layer else "" for layer in grow):
            if f"{prefix}inv_freq" in buffers and f"{prefix}original_inv_freq" in buffers:  # it has grown before
                put(buffers, f"{prefix}inv_freq", buffers[f"{prefix}original_inv_freq"])
    try:
        yield min(limits, default=None)
    finally:
        for table, name, before in reversed(saved):
            table[name] = before
