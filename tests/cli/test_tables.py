"""Tables lose nothing, however narrow the terminal is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qeff_ir.cli.tables import Grid, grid

from .conftest import Outcome, Qeff

WIDTHS = [20, 40, 60, 80, 200]


def rendered(what: object, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False, markup=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def costs() -> Grid:
    numbers = ("nodes", "MB weights", "MB cache", "G multiply-adds", "share")
    table = grid("run", "operator", *numbers, right=numbers)
    table.add_row("Prefill, 32 tokens", "all", "", "123,456.789", "1,234.567", "12,345.6789", "")
    table.add_row("", Text("SkipSimplifiedLayerNormalization", style="red"), "1 → 24", "1.000", "", "2.0000", "100.0%")
    return table


def letters(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", WIDTHS)
def test_every_header_and_every_cell_is_there(width: int) -> None:
    text = rendered(costs(), width)
    assert max(map(len, text.splitlines())) <= width
    assert {"operator", "nodes", "share"} <= set(text.replace(":", " ").split())
    for number in ("123,456.789", "1,234.567", "12,345.6789", "1 → 24", "2.0000", "100.0%", "all"):
        assert number in text
    for word in ("Prefill,", "tokens"):
        assert word in text
    assert "SkipSimplifi" in text
    inside = rendered(Padding(costs(), (0, 0, 0, 4), expand=False), width)
    assert max(map(len, inside.splitlines())) <= width and "100.0%" in inside


def test_a_wide_terminal_has_one_line_for_a_row() -> None:
    rows = rendered(costs(), 200).splitlines()
    assert len(rows) == 4
    assert rows[2].split()[:3] == ["Prefill,", "32", "tokens"]


def test_a_narrow_terminal_has_one_line_for_a_cell() -> None:
    lines = rendered(costs(), 40).splitlines()
    assert lines[:2] == ["run: Prefill, 32 tokens", "operator: all"]
    assert "G multiply-adds: 12,345.6789" in lines


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_commands_tables_at_any_width(
    qeff: Qeff, compiled: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = qeff("cost", compiled[0])
    assert (said.code, said.err) == (0, "")
    assert max(map(len, said.out.splitlines())) <= width
    for word in ("run", "Prefill,", "Decode,", "operator", "MatMul", "nodes", "cache", "multiply-adds", "share"):
        assert word in said.out, word
    passes = qeff("passes").out
    for word in ("option", "values", "default", "meaning", "layout"):
        assert word in passes
    built = qeff("compile", "qeff_ir/demo/model", "-o", compiled[0], "--target", "onnxruntime").out
    for word in ("pass", "what it did", "nodes", "time", "canonicalize", "passes"):
        assert word in built
