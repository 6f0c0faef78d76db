"""What the passes of a pipeline did, as a table."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from qeff_ir.cli.terminal import seconds


def grid(*headers: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the style of all tables here: a rule below the headers, and nothing else drawn."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for header in headers:
        number = header in right
        table.add_column(header, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def pipeline_table(report: dict[str, Any]) -> Table:
    """The table of a report.

    Args:
        report: `qeff_ir.passing.manager.Report` as JSON data, which is how a package keeps it.
    """
    table = grid("pass", "what it did", "nodes", "time", right=("nodes", "time"))
    runs: list[dict[str, Any]] = report["passes"]
    for run in runs:
        before, after = run["nodes"]
        table.add_row(Text(run["id"], style="cyan"), _deeds(run), _change(before, after), seconds(run["seconds"]))
    if runs:
        total = seconds(sum(r["seconds"] for r in runs))
        nodes = _change(runs[0]["nodes"][0], runs[-1]["nodes"][1])
        table.add_row(f"{len(runs)} passes", "", nodes, total, style="bold")
    return table


def _change(before: int, after: int) -> str:
    return f"{before} → {after}" if before != after else str(after)


def _deeds(run: dict[str, Any]) -> Text:
    """What fired, the most frequent first, and why sites were left alone."""
    fired = sorted(run["fired"].items(), key=lambda item: -item[1])
    missed = Counter(m["reason"] for m in run["missed"])
    text = Text(", ".join(f"{name} ×{count}" for name, count in fired))
    for reason, count in missed.items():
        text.append(f"{'; ' if text else ''}{count} left alone: {reason}", style="yellow")
    if not text:
        text.append("changed in place" if run["modified"] else "nothing to do", style="dim")
    return text
