"""Where qeff-ir keeps what it makes: packages, bundles, and what it remembers of files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Where packages go by default: ``$QEFF_HOME``, ``$XDG_CACHE_HOME/qeff_models``, or ``~/.cache/qeff_models``.

    The order is the AI 100 contract's (§4.5).
    """
    if home := os.environ.get("QEFF_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qeff_models"
