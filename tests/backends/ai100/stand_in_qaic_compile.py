"""A stand-in for `qaic-compile` that refuses whatever is outside the contract, and writes a binary otherwise.

It reads its own arguments; the graph and the files are checked by `backends.ai100.contract`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from backends.ai100.contract import violations
from backends.ai100.sdk import Sdk, descriptions


def main(argv: list[str]) -> int:
    """Compile like the compiler whose name this file was started under; returns the exit code."""
    name = Path(argv[0]).name
    sdk = next((s for s in descriptions() if s.compiler == name), descriptions()[-1])
    given: dict[str, str] = {}
    for argument in argv[1:]:
        flag, equals, value = argument.removeprefix("-").partition("=")
        problem = _problem(argument, flag, equals, value, sdk)
        if problem or flag in given:
            return _fail(problem or f"Option given twice: '{argument}'")
        given[flag] = value
    needed = [f for f in ("aic-hw", "aic-hw-version", "m", "aic-binary-dir") if f not in given]
    if needed:
        return _fail(f"Missing option: '-{needed[0]}'")
    for violation in violations(Path.cwd()):
        return _fail(str(violation))
    out = Path(given["aic-binary-dir"])
    if out.exists():
        return _fail(f"Output directory exists: {out}")
    out.mkdir()
    (out / "programqpc.bin").write_bytes(b"stand-in\n")
    return 0


def _problem(argument: str, flag: str, equals: str, value: str, sdk: Sdk) -> str | None:
    kind = sdk.flags.get(flag)
    if kind is None or not argument.startswith("-"):
        return f"Invalid option: '{argument}'"
    if (kind == "flag") == bool(equals):
        return f"Option takes {'no' if kind == 'flag' else 'a'} value: '{argument}'"
    if kind == "int" and not value.lstrip("-").isdigit():
        return f"Option takes a number: '{argument}'"
    if kind == "input" and not Path(value).is_file():
        return f"File not found: '{value}'"
    return None


def _fail(message: str) -> int:
    print(f"Error message: {message}", file=sys.stderr)
    print("Unable to compile", file=sys.stderr)
    return 255
