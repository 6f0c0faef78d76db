"""The harness runs, says what is missing, and its comparison tells a loss from noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import every
from benchmarks.__main__ import app
from benchmarks.compare import changes
from benchmarks.forms import FORMS
from benchmarks.ours import NAME
from benchmarks.race import SHARE, reached, standing
from benchmarks.result import SCHEMA, Result, Row, figure, markdown, plot
from benchmarks.shapes import SHAPES, config
from benchmarks.sparse_checkpoint import write_checkpoint
from qeff_ir.frontend.source import open_source
from qeff_ir.quantized import quantized

ROOT = Path(__file__).parents[2]
MEMORY = {"session MB", "of weights and caches %"}
"""Figures that not every contender has."""
RESULT = Result(
    "decode",
    False,
    {"shape": "tiny"},
    [
        Row("qeff-ir", {"tokens/s": figure([9.0, 10.0, 11.0], "higher"), "peak MB": figure([100.0])}),
        Row("peer", missing="it is not installed"),
    ],
)


def saved(result: Result, file: Path) -> Path:
    file.write_text(json.dumps(result.to_json()))
    return file


def changed(**figures: Any) -> Result:
    first, second = RESULT.rows
    return replace(RESULT, rows=[replace(first, figures={**first.figures, **figures}), second])


def compare(*files: Path) -> int:
    return CliRunner().invoke(app, ["compare", *map(str, files)]).exit_code


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    assert Result.read(saved(RESULT, tmp_path / "a.json")) == RESULT
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["schema"] == SCHEMA and data["machine"]["cores"] >= 1 and "torch" in data["versions"]
    assert data["rows"][0]["figures"]["tokens/s"] == {
        "median": 10.0,
        "low": 9.0,
        "high": 11.0,
        "runs": 3,
        "better": "higher",
    }
    for other in (SCHEMA + 1, SCHEMA - 1):
        (tmp_path / "a.json").write_text(json.dumps({**data, "schema": other}))
        with pytest.raises(ValueError, match=f"is of schema {other}, "):
            Result.read(tmp_path / "a.json")


def test_a_figure_of_no_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        figure([])


def test_markdown_and_plot_show_every_row_that_ran(tmp_path: Path) -> None:
    table = markdown(RESULT)
    assert "| qeff-ir | 10.0 ± 1.00 | 100 |" in table
    assert "| peer | missing: it is not installed |  |" in table
    pytest.importorskip("matplotlib", reason="plots are an extra")
    plot(RESULT, tmp_path / "a.svg")
    assert "qeff-ir" in (tmp_path / "a.svg").read_text()


def test_tables_of_files_are_printed(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["table", str(saved(RESULT, tmp_path / "a.json"))])
    assert said.output == f"decode: shape tiny\n\n{markdown(RESULT)}\n"
    (tmp_path / "b.json").write_text("{")
    assert CliRunner().invoke(app, ["table", str(tmp_path / "b.json")]).exit_code == 2


def test_every_suite_can_be_asked_for() -> None:
    names = {command.name for command in app.registered_commands}
    assert set(every.SUITES) <= names


def test_a_loss_beyond_the_spread_is_worse(tmp_path: Path) -> None:
    before = saved(RESULT, tmp_path / "before.json")
    slower = saved(changed(**{"tokens/s": figure([7.0, 8.0], "higher")}), tmp_path / "slower.json")
    larger = saved(changed(**{"peak MB": figure([120.0])}), tmp_path / "larger.json")
    noisy = saved(changed(**{"tokens/s": figure([8.0, 9.0, 9.5], "higher")}), tmp_path / "noisy.json")
    faster = saved(changed(**{"tokens/s": figure([20.0], "higher")}), tmp_path / "faster.json")
    codes = {name: compare(before, tmp_path / f"{name}.json") for name in ("slower", "larger", "noisy", "faster")}
    assert codes == {"slower": 1, "larger": 1, "noisy": 0, "faster": 0}
    assert slower and larger and noisy and faster


def test_a_row_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = replace(RESULT, rows=[Row("qeff-ir", missing="it broke")])
    assert compare(saved(RESULT, tmp_path / "a.json"), saved(gone, tmp_path / "b.json")) == 1


def test_other_settings_do_not_compare(tmp_path: Path) -> None:
    other = replace(RESULT, settings={"shape": "125M"})
    with pytest.raises(ValueError, match="same settings"):
        changes(RESULT, other, 0.05)
    assert compare(saved(RESULT, tmp_path / "a.json"), saved(other, tmp_path / "b.json")) == 2


@pytest.mark.parametrize(
    ("suite", "more", "figures"),
    [
        ("decode", ["--peers", "eager", "--threads", "1"], {"tokens/s", "share of bandwidth %", "equal steps %"}),
        (
            "lowering",
            [],
            {"lowered s", "lower s", "passes s", "emit s", "total s", "CPU s", "peak MB", "own MB", "nodes"},
        ),
    ],
)
def test_a_suite_runs_in_its_quick_form(suite: str, more: list[str], figures: set[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks", suite, "--quick", "--json", str(file), *more],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    result = Result.read(file)
    assert result.suite == suite and result.quick
    ran = [row for row in result.rows if row.missing is None]
    assert len(ran) >= 2 and all(set(row.figures) - MEMORY == figures for row in ran)
    assert all(f.median > 0 for row in ran for f in row.figures.values())
    if suite == "decode":  # the same tokens, or the race is none
        assert [row.figures["equal steps %"].median for row in ran] == [100.0, 100.0]
        assert set(ran[0].figures) >= MEMORY


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_checkpoints_is_one_that_is_read(name: str, tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    write_checkpoint(config(shape), tmp_path, form=FORMS[name])
    weights = open_source(tmp_path).weights()
    found = [key for key, tensor in weights.items() if quantized(tensor) is not None]
    assert len(found) == (7 * shape["layers"] if FORMS[name].settings else 0)


@pytest.mark.parametrize(
    ("better", "words"),
    [("higher", f"ahead of {NAME}: fast by 2.00 times"), ("lower", f"ahead of {NAME}: slow by 2.00 times")],
)
def test_who_is_ahead_is_told(better: Any, words: str) -> None:
    rows = [Row(n, {"speed": figure([v], better)}) for n, v in ((NAME, 10.0), ("fast", 20.0), ("slow", 5.0))]
    assert standing([*rows, Row("gone", missing="it is not here")]) == words
    assert standing([Row(NAME, {"speed": figure([30.0])}), Row("gone", missing="x")]) == ""
    assert standing([Row(NAME, missing="x"), Row("peer", {"speed": figure([30.0])})]) == ""
    best = [Row(n, {"speed": figure([v], better)}) for n, v in ((NAME, 8.0), (f"{NAME}, int4", 8.5), ("peer", 8.2))]
    ahead = standing(best).partition(" is ahead of every peer")[0]
    assert ahead == (f"{NAME}, int4" if better == "higher" else NAME)


@pytest.mark.parametrize(("share", "stands"), [(90.0, "at or above"), (89.9, "below"), (95.0, "at or above")])
def test_a_race_says_whether_the_bandwidth_is_reached(share: float, stands: str) -> None:
    said = reached(Row("ours", {SHARE: figure([share], "neither")}))
    assert said == f"ours reaches {share} % of the memory's bandwidth, {stands} the goal of 90 %"
