"""What the passes of a pipeline did, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from qeff_ir.cli.terminal import seconds, show

if TYPE_CHECKING:
    from qeff_ir.package import Manifest
    from qeff_ir.testing.trace import Comparison

_WORD = 12
"""Cells of text are broken into pieces of at least so many characters."""


class Grid(Table):
    """A table that loses nothing: where the terminal is too narrow for its columns, each cell gets a line.

    Args:
        headers: Of the columns.
        right: Headers of the columns of numbers, which are never broken.
    """

    def __init__(self, headers: Sequence[str], right: Sequence[str]) -> None:
        super().__init__(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
        self._right = [header in right for header in headers]
        self._needed = [max(map(cell_len, header.split() or [""])) for header in headers]
        self._wanted = list(map(cell_len, headers))
        self._lines: list[tuple[RenderableType | None, ...]] = []
        for header, number in zip(headers, self._right, strict=True):
            self.add_column(header, justify="right" if number else "left", overflow="fold")

    def add_row(self, *renderables: RenderableType | None, **options: Any) -> None:
        """See `rich.table.Table.add_row`; cells are texts."""
        super().add_row(*renderables, **options)
        self._lines.append(renderables)
        for index, cell in enumerate(renderables):
            text, number = str(cell or ""), self._right[index]
            width = cell_len(text) if number else min(_WORD, max(map(cell_len, text.split() or [""])))
            self._needed[index] = max(self._needed[index], width)
            self._wanted[index] = max(self._wanted[index], cell_len(text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spare = options.max_width - sum(self._needed) - _GAP * (len(self.columns) - 1)
        if spare >= 0:
            for column, needed, wanted in zip(self.columns, self._needed, self._wanted, strict=True):
                more = min(max(wanted - needed, 0), spare)
                column.width, spare = needed + more, spare - more
            yield from super().__rich_console__(console, options)
            return
        for number, line in enumerate(self._lines):
            if number:
                yield Text()
            for column, cell in zip(self.columns, line, strict=True):
                if str(cell or ""):
                    name = f"{column.header}: " if str(column.header) else ""
                    yield Text.assemble((name, "bold"), cell if isinstance(cell, Text) else str(cell), overflow="fold")


_GAP = 3
"""Spaces between two columns."""


def grid(*headers: str, right: tuple[str, ...] = ()) -> Grid:
    """An empty table in the style of all tables here: a rule below the headers, and nothing else drawn."""
    return Grid(headers, right)


def pipeline_table(report: dict[str, Any]) -> Grid:
    """The table of a report.

    Args:
        report: `qeff_ir.passing.manager.Report` as JSON data, which is how a package keeps it.
    """
    runs: list[dict[str, Any]] = report["passes"]
    driven = any(run.get("error") is not None for run in runs)
    error = ["error"] if driven else []
    table = grid("pass", "what it did", "nodes", *error, "time", right=("nodes", "error", "time"))
    for run in runs:
        before, after = run["nodes"]
        told = [f"{run['error']:.1e}"] if driven else []
        name = Text(run["id"], style="cyan")
        table.add_row(name, _deeds(run), _change(before, after), *told, seconds(run["seconds"]))
    if runs:
        total = seconds(sum(r["seconds"] for r in runs))
        nodes = _change(runs[0]["nodes"][0], runs[-1]["nodes"][1])
        table.add_row(f"{len(runs)} passes", "", nodes, *([""] if driven else []), total, style="bold")
    return table


def show_programs(manifest: Manifest) -> None:
    """Show what the passes did to each program of a package, with its name where there are several."""
    for name, program in manifest.programs.items():
        show()
        if len(manifest.programs) > 1:
            show(Text(f"Program {name}: {program.model}", style="bold"))
        show(pipeline_table(program.report))
    show()


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


def agreement_table(comparisons: Mapping[str, Comparison], limit: float) -> Grid:
    """How far each target's answers lie from those of transformers.

    Args:
        comparisons: By target.
        limit: The largest error that still counts as agreement.
    """
    table = grid("target", "tokens", "max |error| / rms", "bound", "", right=("max |error| / rms", "bound"))
    for target, found in comparisons.items():
        table.add_row(
            target,
            "all agree" if found.agreement == found.steps else f"differ from step {found.agreement} on",
            f"{found.error:.1e}",
            f"{limit:.1e}",
            Text("✓", style="green") if found.equal(limit) else Text("✗", style="bold red"),
        )
    return table
