"""Run the AI 100 compiler over an emitted folder."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

from backends.ai100.emit import BINARY, BINARY_FOLDER, COMMAND
from qeff_ir.errors import CompileError

_LINES = 5
"""Lines of the compiler's messages that an error repeats."""


def run(compiler: Path, folder: Path) -> None:
    """Compile the package in `folder`; the result goes to its ``qpc`` folder.

    Raises:
        CompileError: The compiler cannot be started, fails, or leaves no binary.
    """
    argv: list[str] = json.loads((folder / COMMAND).read_text())["argv"]
    argv[0] = str(compiler.resolve())
    shutil.rmtree(folder / BINARY_FOLDER, ignore_errors=True)  # what a failed run may have left
    shown = shlex.join(argv)
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CompileError(f"the compiler {compiler} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        raise CompileError(
            f"`{shown}` in {folder} failed with exit code {done.returncode}: {_tail(done.stderr or done.stdout)}"
        )
    if not (folder / BINARY).is_file():
        raise CompileError(f"`{shown}` in {folder} ended well, but left no {BINARY}: {_tail(done.stdout)}")


def _tail(text: str) -> str:
    """The last lines, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_LINES:]) or "it said nothing"
