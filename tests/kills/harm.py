"""Die, or let an operation fail, at the k-th event of the file system below a folder; for a forked process only."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qeff_ir import replacement

_EVENTS = frozenset(
    {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "os.listdir"}
    | {"os.scandir"}
)
"""Audit events of Python that read or change a disk; the first argument of each is a path."""

CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)


@dataclass(frozen=True)
class Harm:
    """What happens to a process.

    Attributes:
        kind: ``kill`` it; let one operation fail (``error``), or all from there on (``errors``); or only count.
        at: Number of the event, from 1 on.
        code: ``errno`` of the error.
    """

    kind: Literal["kill", "error", "errors", "none"]
    at: int = 0
    code: int = 0


class Events:
    """Counts events, and does harm at one of them."""

    def __init__(self, root: Path, harm: Harm) -> None:
        self._root, self._harm = str(root), harm
        self.count = 0

    def install(self) -> None:
        """Watch this process from now on; there is no way back."""
        for name in ("fsync", "copy_file_range", "pwrite"):
            setattr(os, name, self._around(getattr(os, name)))
        replacement.exchange = self._around(replacement.exchange)
        sys.addaudithook(self._audit)

    def happen(self) -> None:
        """Count an event."""
        self.count += 1
        due = self.count >= self._harm.at if self._harm.kind == "errors" else self.count == self._harm.at
        if not due:
            return
        if self._harm.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._harm.kind != "none":
            raise OSError(self._harm.code, os.strerror(self._harm.code))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        # Names without a folder are those that rmtree removes below a folder that it has opened.
        if isinstance(path, str) and (path.startswith(self._root) or not path.startswith("/")):
            self.happen()

    def _around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """An operation that Python does not tell of, with an event before it; a kill may come after it too."""

        def call(*arguments: Any) -> Any:
            self.happen()
            result = real(*arguments)
            if self._harm.kind in ("kill", "none"):
                self.happen()
            return result

        return call
