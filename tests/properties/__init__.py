"""Properties of every pass, backend and runtime over drawn decoders; `tests.kill` tells which faults each catches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import settings

T = TypeVar("T")


def scaled(share: float) -> Callable[[T], T]:
    """Decorator: a share of the profile's number of examples, for properties that cost more than others."""
    return settings(max_examples=max(1, round(settings().max_examples * share)))  # type: ignore[return-value]
