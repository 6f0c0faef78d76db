"""The targets: a folder here with a module ``backend``, or an entry point of another distribution, adds one."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.base import Backend
    from backends.options import CompileOptions

GROUP = "qeff_ir.backends"
"""Entry points of this group name a module with a `BACKEND`."""


def backend_names() -> list[str]:
    """Names of all backends."""
    return sorted({*_folders(), *_entry_points(tuple(sys.path))})


def find_backend(name: str) -> Backend:
    """The backend of that name; a folder here is taken before an entry point.

    Raises:
        CompileError: There is none, or the module of an entry point cannot be imported.
    """
    from qeff_ir.errors import CompileError

    if name not in backend_names():
        raise CompileError(f"there is no target '{name}': use auto, {', '.join(backend_names())}")
    if name in _folders():
        return importlib.import_module(f"{__name__}.{name}.backend").BACKEND
    point = _entry_points(tuple(sys.path))[name]
    try:
        return point.load().BACKEND
    except Exception as error:  # whatever another package's code raises
        raise CompileError(
            f"the target '{name}' cannot be imported ({type(error).__name__}: {error}): repair or remove the package "
            f"with the entry point '{name} = {point.value}'"
        ) from error


def option_types() -> list[type[CompileOptions]]:
    """The options of the targets here, from the modules ``options`` of their folders: no backend is imported."""
    return [
        importlib.import_module(f"{__name__}.{name}.options").Options
        for name in _folders()
        if importlib.util.find_spec(f"{__name__}.{name}.options") is not None
    ]


def load_passes() -> None:
    """Import the modules of ``passes`` in each folder here, so that all passes are registered; plug-ins load theirs."""
    for name in _folders():
        for package in pkgutil.iter_modules([f"{path}/{name}" for path in __path__]):
            if package.name == "passes":
                found = importlib.import_module(f"{__name__}.{name}.passes")
                for module in pkgutil.iter_modules(found.__path__):
                    importlib.import_module(f"{found.__name__}.{module.name}")


def preferred() -> list[str]:
    """Names of all backends that can be imported, in the order in which ``auto`` tries them; warns of the others."""
    from qeff_ir.errors import CompileError

    priorities: dict[str, int] = {}
    for name in backend_names():
        try:
            priorities[name] = find_backend(name).priority
        except CompileError as error:
            warnings.warn(str(error), stacklevel=2)
    return sorted(priorities, key=lambda name: -priorities[name])


def _folders() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if m.ispkg]


@functools.cache
def _entry_points(_path: tuple[str, ...]) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points on a search path: looking them up reads many small files."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
