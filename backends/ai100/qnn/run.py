"""Run QNN's tools over an emitted folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from backends.ai100.qnn.files import CONVERTED, EXTENSIONS, PLATFORM, ROOT_VARIABLE
from backends.ai100.tools import run_tool
from qeff_ir.errors import CompileError

_TOOLS = ("qairt-converter", "qnn-context-binary-generator")


def missing() -> str | None:
    """Why QNN cannot compile here, as a clause; `None` when its tools are there."""
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        return f"${ROOT_VARIABLE} is not set: install Qualcomm AI Engine Direct, and set it to the SDK's folder"
    absent = [name for name in _TOOLS if not _tool(root, name).is_file()]
    return f"${ROOT_VARIABLE} is {root}, which has no {_tool(root, absent[0])}: correct it" if absent else None


def version() -> str:
    """What tells one SDK from another: its place, and size and time of its tools; ``none`` without one."""
    root = os.environ.get(ROOT_VARIABLE)
    if not root or missing() is not None:
        return "none"
    stats = [_tool(root, name).stat() for name in _TOOLS]
    return f"{root} {[(s.st_size, s.st_mtime_ns) for s in stats]}"


def run(folder: Path, commands: list[list[str]]) -> None:
    """Run the converter and the generator; the result goes to ``qpc``, and the converted model is taken away.

    What the tools print lies in ``converter_stdout.txt`` and its like, as the contract has it.

    Raises:
        CompileError: The SDK is not there, or a tool cannot be started or fails.
    """
    problem = missing()
    if problem is not None:
        raise CompileError(f"QNN cannot compile here: {problem}")
    root = str(Path(os.environ[ROOT_VARIABLE]).resolve())  # the tools run in the folder
    extensions = folder / EXTENSIONS
    text = extensions.read_text()
    fields: dict[str, str] = json.loads(text)["backend_extensions"]
    placed = {name: _placed(value, root) for name, value in fields.items()}  # the tools do not know of variables
    extensions.write_text(json.dumps({"backend_extensions": placed}))
    try:
        for name, command in zip(("converter", "context_binary_generator"), commands, strict=True):
            result = CONVERTED if name == "converter" else "qpc/programqpc.bin"
            run_tool([_placed(word, root) for word in command], folder, result, log=name)
    finally:
        extensions.write_text(text)
        (folder / CONVERTED).unlink(missing_ok=True)  # all the weights once more


def _placed(text: str, root: str) -> str:
    return text.replace(f"${ROOT_VARIABLE}", root)


def _tool(root: str, name: str) -> Path:
    return Path(root) / "bin" / PLATFORM / name
