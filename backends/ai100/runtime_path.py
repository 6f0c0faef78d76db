"""Where the SDK keeps the Python modules of its runtime."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from backends.ai100.sdk import ROOT


def extend(root: Path = ROOT) -> None:
    """Make `qaicrt` and `QAicApi_pb2` importable, if the SDK is there (contract §0)."""
    for folder in (root / "dev" / "lib" / platform.machine(), root / "dev" / "python"):
        if folder.is_dir() and str(folder) not in sys.path:
            sys.path.append(str(folder))
