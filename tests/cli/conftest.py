from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qeff_ir.cli import main
from qeff_ir.demo import MODEL_FOLDER

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr of a command that failed on bad input."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.startswith("qeff: error: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err


Qeff = Callable[..., Outcome]


def in_process(*words: object) -> Outcome:
    """A command in this process, which has the imports behind it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    return Outcome(code, out.getvalue(), err.getvalue())


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "QEFF_QAIC_COMPILE")}
    return {**clean, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "qeff_ir.cli", *map(str, words)]


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory):
    """A cache of our own, no hub, no SDK."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("QEFF_QAIC_COMPILE", raising=False)
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture(scope="session")
def qeff() -> Qeff:
    return in_process


@pytest.fixture(scope="session")
def qeff_process() -> Qeff:
    """A command in a process of its own, as a user starts it."""

    def run(*words: object, **options: object) -> Outcome:
        given: dict[str, Any] = {"env": environment(), **options}
        done = subprocess.run(command(*words), capture_output=True, text=True, check=False, **given)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def compiled(qeff: Qeff, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A package for ONNX Runtime, and what `compile` said."""
    folder = tmp_path_factory.mktemp("package") / "out"
    report = folder.parent / "report.json"
    return folder, qeff("compile", MODEL_FOLDER, "-o", folder, "--target", "onnxruntime", "--report", report)


@pytest.fixture
def package(compiled: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of that package, to be damaged."""
    return shutil.copytree(compiled[0], tmp_path / "package")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return shutil.copytree(MODEL_FOLDER, tmp_path / "model")
