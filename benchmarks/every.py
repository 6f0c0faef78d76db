"""All suites in turn, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.options import Quick

SUITES = (
    "lowering",
    "passes",
    "pipeline",
    "decode",
    "prefill",
    "embed",
    "lora",
    "vision",
    "serve",
    "coverage",
    "package",
)
_NO_FIGURES = {"coverage", "passes"}
"""Suites that print a table of their own and write no figures."""


def main(
    folder: Annotated[Path | None, typer.Option("--json", help="Write one file a suite here.", metavar="DIR")] = None,
    quick: Quick = False,
) -> None:
    """Run every suite; the exit code is 1 when one of them failed."""
    failed: list[str] = []
    for suite in SUITES:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks", suite, *(["--quick"] if quick else [])]
        if folder is not None and suite not in _NO_FIGURES:
            folder.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(folder / f"{suite}.json")]
        started = time.monotonic()
        if subprocess.run(command, check=False).returncode:
            failed.append(suite)
        Console().print(f"{suite}: {time.monotonic() - started:.0f} s")
    if failed:
        Console().print(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)
