"""When garbage is collected: not in the middle of work that makes very many objects."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

MANY = 500_000
"""Objects that blocks may leave behind at least before all that lives is looked through, for half a second."""

PART = 4
"""One to so many of the objects that live may be left behind, as Python has it for those that are old."""

_left = 0
"""Objects that blocks have left behind since the last time."""

_living = 0
"""Objects that lived after the last time."""


@contextmanager
def settled() -> Generator[None]:
    """Collect garbage only when asked to for as long as the block lasts, and not among what lives already.

    Tracing and passes make so many objects that the collector would look through all of them, and all of torch, again
    and again: the time for a node would grow with the number of nodes.

    What a block leaves behind is old when it ends, and Python collects old objects only once there are many that grew
    old in its own way. So the blocks count them: otherwise no module would be freed in a process that compiles many.
    The count is the collector's own (`gc.get_count`, `gc.callbacks`): to count the objects themselves takes longer the
    more of them live, for each block anew.
    """
    global _left, _living
    enabled = gc.isenabled()
    young, middle, _ = gc.get_count()  # objects, and collections of as many as the threshold says
    _left += young + middle * gc.get_threshold()[0]  # freezing makes them old
    gc.freeze()
    gc.disable()
    gc.callbacks.append(_count)
    try:
        yield
    finally:
        gc.callbacks.remove(_count)
        _left += gc.get_count()[0]
        gc.freeze()  # makes what is left old, as it was before the block
        gc.unfreeze()
        if _left > max(MANY, _living // PART):
            gc.collect()
            gc.freeze()
            _left, _living = 0, gc.get_freeze_count()
            gc.unfreeze()
        if enabled:
            gc.enable()


def _count(phase: str, info: dict[str, Any]) -> None:
    """Before a collection that somebody has asked for sets the collector's count to zero."""
    global _left
    _left += gc.get_count()[0] if phase == "start" else -info["collected"]
