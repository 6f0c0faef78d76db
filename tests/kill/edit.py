"""Edits of our source code that follow it where it goes (`qeff_ir.testing.edits`).

A function is named by the end of its dotted path (``attention._grouped``, ``onnxruntime.session.OrtSession.run``), as
much of it as tells it from all others, so that a file may move.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

from qeff_ir.testing.edits import EditError, replaced, scopes

__all__ = ["EditError", "Place", "find", "places", "replaced"]

SOURCES = ("qeff_ir", "passes", "backends", "benchmarks")
"""Folders that faults are planted in."""


@dataclass(frozen=True)
class Place:
    """A module, class or function of the source.

    Attributes:
        file: Path of its file, relative to the root.
        inner: Names of the classes and functions around it and its own, outermost first; empty for a module.
    """

    file: Path
    inner: tuple[str, ...]


@functools.cache
def places(root: Path) -> dict[str, Place]:
    """Every module, class and function below a root by its whole dotted path."""
    found: dict[str, Place] = {}
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root)
            module = ".".join(file.with_suffix("").parts)
            for inner, _ in scopes(ast.parse(path.read_text())):
                found[".".join([module, *inner])] = Place(file, inner)
    return found


def find(root: Path, where: str) -> Place:
    """The place of that name.

    Raises:
        EditError: There is none, or there are several.
    """
    known = places(root)
    found = [place for name, place in known.items() if f".{name}".endswith(f".{where}")]
    if len(found) != 1:
        raise EditError(f"'{where}' names {len(found)} places in the source, not one")
    return found[0]
