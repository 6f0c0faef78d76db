"""Results as Markdown, for a page."""

from __future__ import annotations

from pathlib import Path

import typer

from benchmarks.result import Result, markdown, title


def main(files: list[Path]) -> None:
    """Print the tables of JSON files, each below what it was run with."""
    for file in files:
        try:
            result = Result.read(file)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        print(f"{title(result)}\n\n{markdown(result)}")
