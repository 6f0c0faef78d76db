"""The bundled adapters: small, and their answers right."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from qeff_ir.adapters.folder import read_adapter
from qeff_ir.cli import demo_lora
from qeff_ir.cli.app import app
from qeff_ir.demo import ADAPTERS_FOLDER, TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_bundled_adapter_is_small_and_names_no_place_outside(name: str) -> None:
    folder = ADAPTERS_FOLDER / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 200_000
    assert (folder / read_adapter(folder).base).resolve() == (ADAPTERS_FOLDER.parent / "model").resolve()


def test_the_demo_switches_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["demo", "--lora", "--target", "onnxruntime", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "All answers are right" in done.output and "✗" not in done.output
    # The kill test: held against another task, the same answers are wrong.
    monkeypatch.setitem(TASKS, "larger", min)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "✗" in done.output
    assert len(demo_lora.NUMBERS) == 5
