"""What got worse between two runs of one suite."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.result import Figure, Result


def main(
    before: Path,
    after: Path,
    tolerance: float = typer.Option(0.05, help="Part of a figure that may be lost."),
) -> None:
    """Compare two JSON files; the exit code is 1 when a figure got worse by more than the tolerance and the spread."""
    try:
        one, two = Result.read(before), Result.read(after)
        found = changes(one, two, tolerance)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    table = Table("row", "figure", "before", "after", "x", "")
    for name, key, old, new, worse in found:
        ratio = f"{new.median / old.median:.2f}" if old.median else "-"
        table.add_row(name, key, f"{old.median:.4g}", f"{new.median:.4g}", ratio, "worse" if worse else "")
    Console().print(table)
    gone = sorted(_measured(one) - _measured(two))
    for name in gone:
        Console().print(f"{name} was measured before and is not any more")
    if gone or any(worse for *_, worse in found):
        raise typer.Exit(1)


def changes(before: Result, after: Result, tolerance: float) -> list[tuple[str, str, Figure, Figure, bool]]:
    """Every figure that both have: row, name, before, after, whether it got worse.

    A figure is worse when its median lost more than `tolerance` and the spreads of the runs do not overlap.

    Raises:
        ValueError: The results are of different suites or settings.
    """
    if before.suite != after.suite or dict(before.settings) != dict(after.settings):
        raise ValueError(f"{before.suite} and {after.suite} were not run with the same settings: they do not compare")
    rows = {row.name: row for row in after.rows}
    return [
        (row.name, key, old, new, _is_worse(old, new, tolerance))
        for row in before.rows
        for key, old in row.figures.items()
        if row.name in rows and (new := rows[row.name].figures.get(key)) is not None
    ]


def _is_worse(old: Figure, new: Figure, tolerance: float) -> bool:
    if old.better == "lower":
        return new.median > old.median * (1 + tolerance) and new.low > old.high
    if old.better == "higher":
        return new.median < old.median * (1 - tolerance) and new.high < old.low
    return False


def _measured(result: Result) -> set[str]:
    return {row.name for row in result.rows if row.figures}
