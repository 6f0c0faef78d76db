"""When garbage is collected: not in the middle of work that makes very many objects."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

MANY = 500_000
"""Objects that blocks may leave behind before all that lives is looked through once, for half a second."""

_left = 0
"""Objects that blocks have left behind since the last time."""


@contextmanager
def settled() -> Generator[None]:
    """Collect garbage only when asked to for as long as the block lasts, and not among what lives already.

    Tracing and passes make so many objects that the collector would look through all of them, and all of torch, again
    and again: the time for a node would grow with the number of nodes.

    What a block leaves behind is old when it ends, and Python collects old objects only once there are many that grew
    old in its own way. So the blocks count them: otherwise no module would be freed in a process that compiles many.
    """
    global _left
    enabled = gc.isenabled()
    young, middle, _ = gc.get_count()  # objects, and collections of as many as the threshold says
    _left += young + middle * gc.get_threshold()[0]  # freezing makes them old too
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        # Counted by freezing them: a list of them (`gc.get_objects`) holds tuples that other threads still fill, and
        # Python's tuple(...) then raises SystemError there.
        frozen = gc.get_freeze_count()
        gc.freeze()
        _left += gc.get_freeze_count() - frozen
        gc.unfreeze()
        if _left > MANY:
            _left = 0
            gc.collect()
        if enabled:
            gc.enable()
