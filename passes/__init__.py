"""The passes that no target owns, one idea a file; importing a module registers its passes."""

from __future__ import annotations

import importlib
import pkgutil


def load_passes() -> None:
    """Import every module of this package, so that all its passes are registered."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
