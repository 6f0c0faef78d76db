"""Properties of every pass, backend and runtime over drawn decoders; `tests.kill` tells which faults each catches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import example, settings

from backends import find_backend
from qeff_ir.testing.recipe import Layer, Recipe
from qeff_ir.testing.strategies import Request, Run

T = TypeVar("T")


def scaled(share: float) -> settings:
    """Decorator: a share of the profile's number of examples, for properties that cost more than others.

    A nightly run has the time for all of them.
    """
    if settings.get_current_profile_name() in ("nightly", "hunt"):
        share = 1.0
    return settings(max_examples=max(1, round(settings().max_examples * share)))


RICH = [
    Recipe(
        (Layer(window=3), Layer(), Layer(window=2)), kv_heads=2, group=2, head_dim=16, value_dim=16, rotary="half",
        activation="gelu-tanh", gated=True, gemm=True, bias=True, qk_norm=True, tied=True, scale=0.4, softcap=2.0,
        final_softcap=3.0,
    ),
    Recipe(
        (Layer(window=4, sinks=True), Layer(experts=3), Layer(shares=0, sinks=True), Layer(linear="delta", kernel=3)),
        kv_heads=2, group=3,
        rotary="partial", gated=True, spelling=3,
    ),
    Recipe(
        (Layer(linear="decay"), Layer(decomposed=True), Layer(window=2, decomposed=True), Layer()),
        group=2, head_dim=8, value_dim=8, alibi=True, learned_positions=True, activation="gelu", norm="layer",
        parallel=True,
    ),
]  # fmt: skip
"""Decoders that have nearly everything between them: what random ones meet one at a time.

None of their numbers is what an op takes when it is told nothing: 0.4 is no ``1 / sqrt(head_dim)``.
"""


def _runs(*counts: tuple[int, int, int], anew: int | None = None) -> tuple[Run, ...]:
    return tuple(Run(3 if max(c) > 1 else 1, c, (False, i == anew, False), reset=False) for i, c in enumerate(counts))


LONG = Request(
    12, 3, _runs((3, 3, 0), (3, 2, 3), (0, 1, 0), (3, 3, 2), (1, 1, 1), (1, 0, 1), (1, 1, 0), anew=3), 11, seed=5
)
"""Whole chunks, parts of one, rows that idle or start anew, up to the last slot and past every window."""


EDGE = Request(5, 3, _runs((3, 3, 3), (2, 1, 0), (0, 1, 1)), 11)
"""A context just as long as the ring of a window of three tokens would be."""


FULL = Request(6, 3, _runs((3, 1, 1), (2, 1, 1), (0, 3, 0), (1, 1, 1)), 11)
"""A row idles, one token short of a full context, while others take a chunk."""


def rich(*, stock: bool = True) -> Callable[[T], T]:
    """Decorator: the property is tried on `RICH` first, for both targets where it takes a stock pipeline."""

    def add(test: Any) -> Any:
        for recipe, target in itertools.product(RICH, ("ai100", "onnxruntime") if stock else ("",)):
            given = [(recipe, LONG), *([(target, find_backend(target).pipeline)] if stock else [])]
            test = example(*given)(test)
        return test

    return add
