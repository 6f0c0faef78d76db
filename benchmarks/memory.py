"""What memory a session takes: the growth of what the process holds, between before it opens and its first answer."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path


def resident() -> int:
    """Bytes of the process that are in memory, mapped files included; what was freed is given back first."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
