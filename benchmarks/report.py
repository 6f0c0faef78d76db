"""What every benchmark does with its figures: a table for people, JSON for machines, a plot for a page."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def table(title: str, rows: Sequence[Row], note: str = "") -> None:
    """Print rows under the keys of the first one; numbers stand on the right."""
    made = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for key, value in rows[0].items():
        made.add_column(key, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        made.add_row(*(_text(value) for value in row.values()))
    Console().print(made)


def write_json(file: Path | None, name: str, settings: Row, rows: Sequence[Row]) -> None:
    """Write settings, versions and rows; nothing when there is no file."""
    if file is None:
        return
    data = {"benchmark": name, "settings": dict(settings), "versions": versions(), "rows": [dict(r) for r in rows]}
    file.write_text(json.dumps(data, indent=2) + "\n")


def bars(file: Path | None, title: str, rows: Sequence[Row], label: str, keys: Sequence[str]) -> None:
    """Draw one panel of bars per key; nothing when there is no file, a sentence when there is no Matplotlib."""
    if file is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        Console().print("no plot: Matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(3.0 + 3.5 * len(keys), 0.5 * len(rows) + 1.4), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    panels = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for axes, key in zip(panels, keys, strict=True):
        drawn = [row for row in rows if isinstance(row[key], int | float)]
        # Ours stands out; the labels stand once, at the left panel.
        colors = ["tab:orange" if "qeff" in str(row[label]) else "lightsteelblue" for row in drawn]
        made = axes.barh([row[label] for row in drawn], [row[key] for row in drawn], color=colors)
        axes.bar_label(made, fmt="%.3g", padding=3)
        axes.set_xlabel(key)
        axes.set_xlim(0, 1.2 * max(row[key] for row in drawn))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(file)


def versions() -> dict[str, str]:
    """Versions of whatever the figures depend on."""
    import onnxruntime
    import torch
    import transformers

    modules = {"torch": torch, "transformers": transformers, "onnxruntime": onnxruntime}
    return {"python": platform.python_version(), **{name: str(m.__version__) for name, m in modules.items()}}


def _text(value: Any) -> str:
    """Three significant digits and no exponent for numbers; a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return str(value)
