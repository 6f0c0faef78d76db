"""Targets of other distributions: found by their entry points, and a sentence when they cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends import backend_names, find_backend, preferred
from qeff_ir.compiler import choose_target
from qeff_ir.errors import CompileError

CODE = """
from backends.onnxruntime.backend import OnnxRuntimeBackend
class Reference(OnnxRuntimeBackend):
    name = "reference"
    title = "another runtime"
    priority = {priority}
    def missing(self, options=None):
        return {missing!r}
BACKEND = Reference()
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Files as pip leaves them."""
    info = folder / "more_targets-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-targets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qeff_ir.backends]\nreference = {folder.name}_target\n")
    (folder / f"{folder.name}_target.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


def test_a_target_of_another_distribution_is_found_and_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "reference" not in backend_names()
    install(tmp_path / "found", monkeypatch, CODE.format(priority=9, missing=None))
    assert "reference" in backend_names() and preferred()[0] == "reference"
    assert find_backend("reference").title == "another runtime"
    assert choose_target("auto")[0] == "reference"


def test_a_target_that_misses_something_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "missing", monkeypatch, CODE.format(priority=9, missing="there is no reference here"))
    name, why = choose_target("auto")
    assert name in ("ai100", "onnxruntime") and "there is no reference here" in why


def test_a_target_that_cannot_be_imported_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "broken", monkeypatch, "raise ImportError('no such driver')")
    with pytest.raises(CompileError, match=r"'reference' cannot be imported \(ImportError: no such driver\): repair"):
        find_backend("reference")
    with pytest.warns(UserWarning, match="no such driver"):
        assert choose_target("auto")[0] in ("ai100", "onnxruntime")
    with pytest.raises(CompileError, match="there is no target 'referense': use auto, ai100, onnxruntime, reference"):
        find_backend("referense")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("BACKEND = = 1", "SyntaxError: invalid syntax"),
        ("BACKENDS = []", "AttributeError: .* has no attribute 'BACKEND'"),
        ("raise RuntimeError('the driver is too old')", "RuntimeError: the driver is too old"),
    ],
)
def test_whatever_the_code_of_another_target_raises_is_one_sentence(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / f"raising{len(code)}", monkeypatch, code)
    with pytest.raises(CompileError, match=rf"'reference' cannot be imported \({said}"):
        find_backend("reference")
    with pytest.warns(UserWarning, match=said):
        assert choose_target("auto")[0] in ("ai100", "onnxruntime")


def test_the_command_line_runs_without_targets_of_others() -> None:
    code = "from backends import backend_names; print(*backend_names())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ai100", "onnxruntime"]
