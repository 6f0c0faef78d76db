"""Run the AI 100 compiler, or QNN's tools, over an emitted folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from backends.ai100.emit import BINARY, BINARY_FOLDER, COMMAND
from backends.ai100.qnn.run import run as run_qnn
from backends.ai100.tools import run_tool
from qeff_ir.errors import CompileError


def run(compiler: Path | None, folder: Path, missing: str | None = None) -> None:
    """Compile the package in `folder`; the result goes to its ``qpc`` folder.

    Args:
        compiler: The AI 100 compiler, where there is one.
        folder: The folder.
        missing: What to say where it is needed and not there.

    Raises:
        CompileError: A tool is not there, cannot be started, fails, or leaves no binary.
    """
    data: dict[str, Any] = json.loads((folder / COMMAND).read_text())
    shutil.rmtree(folder / BINARY_FOLDER, ignore_errors=True)  # what a failed run may have left
    if "commands" in data:
        run_qnn(folder, data["commands"])
        return
    if compiler is None:
        raise CompileError(missing or "there is no AI 100 compiler")
    run_tool([str(compiler.resolve()), *data["argv"][1:]], folder, BINARY)
