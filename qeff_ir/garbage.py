"""When garbage is collected: not in the middle of work that makes very many objects."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def settled() -> Generator[None]:
    """Collect garbage only when asked to for as long as the block lasts, and not among what lives already.

    Tracing and passes make so many objects that the collector would look through all of them, and all of torch, again
    and again: the time for a node would grow with the number of nodes.
    """
    enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
