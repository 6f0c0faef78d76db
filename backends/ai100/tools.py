"""Run a tool of an SDK inside of an emitted folder, and say in one sentence what became of it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qeff_ir.errors import CompileError

_LINES = 5
"""Lines of a tool's messages that an error repeats."""


def run_tool(argv: Sequence[str], folder: Path, result: str, *, log: str | None = None) -> None:
    """Run a command in a folder.

    Args:
        argv: The tool's path and its arguments; no shell reads them.
        folder: Where to run.
        result: The file that the tool has to leave there.
        log: Keep what it prints in ``{log}_stdout.txt`` and ``{log}_stderr.txt``.

    Raises:
        CompileError: The tool cannot be started, fails, or does not leave its result.
    """
    shown = shlex.join(argv)
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CompileError(f"the compiler {argv[0]} cannot be started: {error.strerror}") from error
    if log is not None:
        (folder / f"{log}_stdout.txt").write_text(done.stdout)
        (folder / f"{log}_stderr.txt").write_text(done.stderr)
    if done.returncode != 0:
        raise CompileError(
            f"`{shown}` in {folder} failed with exit code {done.returncode}: {_tail(done.stderr or done.stdout)}"
        )
    if not (folder / result).is_file():
        raise CompileError(f"`{shown}` in {folder} ended well, but left no {result}: {_tail(done.stdout)}")


def _tail(text: str) -> str:
    """The last lines, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_LINES:]) or "it said nothing"
