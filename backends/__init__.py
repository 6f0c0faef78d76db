"""The targets: adding a folder with a `BACKEND` adds a backend."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.base import Backend


def backend_names() -> list[str]:
    """Names of all backends."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        CompileError: There is none.
    """
    from qeff_ir.errors import CompileError

    if name not in backend_names():
        raise CompileError(f"there is no target '{name}': use auto, {', '.join(backend_names())}")
    return importlib.import_module(f"{__name__}.{name}").BACKEND
