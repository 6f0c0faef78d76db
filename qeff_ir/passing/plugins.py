"""Passes from other packages: entry points of the group ``qeff_ir.passes``.

    [project.entry-points."qeff_ir.passes"]
    scale-fold = "my_package.scale_fold"

The name is that of the pass, the value the module that registers it. A plugin that cannot be imported is named in a
warning, and the rest go on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import warnings
from importlib.metadata import EntryPoint

GROUP = "qeff_ir.passes"

BROKEN: dict[str, str] = {}
"""Why plugins could not be imported, by the name of the entry point."""

_DONE: set[tuple[str, str]] = set()


def load(name: str | None = None) -> None:
    """Import the plugins, or the one of a name; each is imported once."""
    for point in _found(tuple(sys.path)):
        key = point.name, point.value
        if (name is not None and point.name != name) or key in _DONE:
            continue
        _DONE.add(key)
        try:
            point.load()
        except Exception as error:  # whatever another package's code raises, it must not stop ours
            where = f" of {point.dist.name}" if point.dist is not None else ""
            BROKEN[point.name] = f"{type(error).__name__}: {error} (entry point '{point.name} = {point.value}'{where})"
            warnings.warn(f"the plugin '{point.name}' cannot be imported: {BROKEN[point.name]}", stacklevel=1)


@functools.cache
def _found(_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points on a search path: looking them up reads many small files."""
    return tuple(importlib.metadata.entry_points(group=GROUP))
