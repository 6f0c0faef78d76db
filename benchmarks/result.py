"""One form for what every suite measures: JSON with one schema, a table for people, Markdown for a page, a plot.

{"schema": 1, "suite": "decode", "quick": false, "settings": {…}, "machine": {…}, "versions": {…},
 "rows": [{"name": "qeff-ir", "missing": null,
           "figures": {"tokens/s": {"median": 49.1, "low": 48.8, "high": 49.4, "runs": 5, "better": "higher"}}}]}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

SCHEMA = 1
"""Version of the JSON form; `benchmarks.compare` refuses another."""

Better = Literal["higher", "lower", "neither"]

_LIBRARIES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "onnxruntime_genai")


@dataclass(frozen=True)
class Figure:
    """One quantity of one row, in the unit that its name gives.

    Attributes:
        median: Of the runs.
        low: The smallest run.
        high: The largest run.
        runs: How many there were, warm-up apart.
        better: Which direction is good.
    """

    median: float
    low: float
    high: float
    runs: int
    better: Better


@dataclass(frozen=True)
class Row:
    """What one contender, model or pass reached.

    Attributes:
        name: Who.
        figures: By name, with the unit in it (``tokens/s``, ``peak MB``).
        missing: Why there are no figures, or `None`.
    """

    name: str
    figures: dict[str, Figure] = field(default_factory=dict[str, Figure])
    missing: str | None = None


@dataclass(frozen=True)
class Result:
    """What one run of one suite measured."""

    suite: str
    quick: bool
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """See the module."""
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "quick": self.quick,
            "settings": dict(self.settings),
            "machine": machine(),
            "versions": versions(),
            "note": self.note,
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def read(cls, file: Path) -> Result:
        """Read what `to_json` made.

        Raises:
            ValueError: The file is of another schema.
        """
        data = json.loads(file.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{file} is of schema {data.get('schema')}, this harness reads {SCHEMA}: measure again")
        rows = [
            Row(r["name"], {name: Figure(**f) for name, f in r["figures"].items()}, r["missing"]) for r in data["rows"]
        ]
        return cls(data["suite"], data["quick"], data["settings"], rows, data["note"])


def figure(runs: Iterable[float], better: Better = "lower") -> Figure:
    """Median and spread of some runs.

    Raises:
        ValueError: There are none.
    """
    values = list(runs)
    if not values:
        raise ValueError("a figure needs at least one run")
    return Figure(statistics.median(values), min(values), max(values), len(values), better)


def machine() -> dict[str, Any]:
    """The machine, and how busy it was: figures of two machines cannot be compared."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory GB": round(memory / 1e9, 1),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Versions of whatever the figures depend on, and is installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def publish(result: Result, json_file: Path | None, plot_file: Path | None) -> None:
    """Print a result, and write the files that were asked for."""
    made = Table(title=title(result), caption=result.note or None, title_justify="left", caption_justify="left")
    names = figure_names(result)
    made.add_column(result.suite)
    for name in names:
        made.add_column(name, justify="right")
    for row in result.rows:
        made.add_row(row.name, *_cells(row, names))
    Console().print(made)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if plot_file is not None:
        plot(result, plot_file)


def title(result: Result) -> str:
    """One line: the suite, and what it was run with."""
    return f"{result.suite}: " + ", ".join(f"{name} {value}" for name, value in result.settings.items())


def figure_names(result: Result) -> list[str]:
    """The figures of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in result.rows for name in row.figures))


def markdown(result: Result) -> str:
    """The result as a Markdown table."""
    names = figure_names(result)
    lines = [f"| {result.suite} | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    lines += [f"| {row.name} | {' | '.join(_cells(row, names))} |" for row in result.rows]
    return "\n".join(lines) + "\n"


def plot(result: Result, file: Path) -> None:
    """Draw one panel of bars for each figure, with the spread of the runs.

    Raises:
        SystemExit: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Canvas  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit("a plot needs Matplotlib: pip install -e '.[bench]'") from error
    names, rows = figure_names(result), [row for row in result.rows if row.figures]
    canvas = Canvas(figsize=(3.0 + 3.5 * len(names), 0.5 * len(rows) + 1.4), layout="constrained")
    canvas.suptitle(title(result), x=0.01, ha="left", fontsize="medium")
    panels = canvas.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        drawn = [(row.name, row.figures[name]) for row in rows if name in row.figures]
        # Ours stands out; the labels stand once, at the left panel.
        colors = ["tab:orange" if label.startswith("qeff") else "lightsteelblue" for label, _ in drawn]
        spread = [[f.median - f.low for _, f in drawn], [f.high - f.median for _, f in drawn]]
        bars = axes.barh([n for n, _ in drawn], [f.median for _, f in drawn], color=colors, xerr=spread, capsize=2)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_xlabel(name)
        axes.set_xlim(0, 1.25 * max(f.high for _, f in drawn) or 1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    canvas.savefig(file)


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    if row.missing is not None:
        return [f"missing: {row.missing}", *[""] * (len(names) - 1)]
    return [_cell(row.figures.get(name)) for name in names]


def _cell(value: Figure | None) -> str:
    if value is None:
        return "-"
    spread = (value.high - value.low) / 2
    text = _number(value.median)
    return f"{text} ± {_number(spread)}" if value.runs > 1 and spread else text


def _number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
