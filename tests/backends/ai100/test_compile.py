from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from backends.ai100 import emit, sdk
from backends.ai100.backend import BACKEND
from backends.ai100.options import Ai100Options
from qeff_ir.errors import CompileError

from .conftest import OPTIONS, Tiny


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_stand_in_compiles(folder: Path, stand_in: Path) -> None:
    assert BACKEND.missing() is None
    BACKEND.compile(folder, OPTIONS)
    assert (folder / "qpc" / "programqpc.bin").read_bytes() == b"stand-in\n"


def test_the_older_sdk_gets_its_own_form(
    tiny: Tiny, tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sdk.COMPILER_VARIABLE, str(stand_in.rename(stand_in.with_name("qaic-exec"))))
    BACKEND.emit(tiny.module, tmp_path / "package", OPTIONS)
    BACKEND.compile(tmp_path / "package", OPTIONS)
    argv = json.loads((tmp_path / "package" / "compile_command.json").read_text())["argv"]
    assert argv[:4] == ["qaic-exec", "-aic-hw", "-compile-only", "-aic-hw-version=2.0"]
    assert BACKEND.versions()["ai100-target"].startswith("1.20-")


def test_a_moved_package_compiles(folder: Path, stand_in: Path) -> None:
    moved = folder.rename(folder.with_name("moved"))
    BACKEND.compile(moved, OPTIONS)
    assert (moved / "qpc" / "programqpc.bin").is_file()


def test_what_a_failed_run_left_is_removed(folder: Path, stand_in: Path) -> None:
    (folder / "qpc").mkdir()
    (folder / "qpc" / "rubbish").touch()
    BACKEND.compile(folder, OPTIONS)
    assert not (folder / "qpc" / "rubbish").exists()


def test_a_forced_flag_reaches_the_compiler(tiny: Tiny, tmp_path: Path, stand_in: Path) -> None:
    options = Ai100Options(prefill_seq_len=8, ctx_len=40, batch_size=2, flags={"warp": 9}, force_flags=True)
    BACKEND.check_options(options)
    BACKEND.emit(tiny.module, tmp_path / "package", options)
    with pytest.raises(
        CompileError, match=r"-warp=9.* exit code 255: .*Invalid option: '-warp=9' \| Unable to compile"
    ):
        BACKEND.compile(tmp_path / "package", options)


def test_a_damaged_folder_does_not_compile(folder: Path, stand_in: Path) -> None:
    shutil.rmtree(folder / "weights")
    with pytest.raises(CompileError, match=r"exit code 255: Error message: \[external-data\]"):
        BACKEND.compile(folder, OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo one >&2; echo two >&2; exit 3", r"qaic-compile .*failed with exit code 3: one \| two$"),
        ("seq 1 9 >&2; exit 1", r"exit code 1: 5 \| 6 \| 7 \| 8 \| 9$"),
        ("echo one; echo two; exit 3", r"exit code 3: one \| two$"),
        ("echo noise; echo why >&2; exit 3", "exit code 3: why$"),
        ("exit 1", "exit code 1: it said nothing$"),
        ("echo fine", r"left no qpc/programqpc\.bin: fine$"),
    ],
)
def test_a_failing_compiler(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv(sdk.COMPILER_VARIABLE, str(script(tmp_path / "qaic-compile", text)))
    with pytest.raises(CompileError, match=message):
        BACKEND.compile(folder, OPTIONS)


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk, "_compiler", lambda _root: None)
    with pytest.raises(CompileError, match="there is no AI 100 compiler at /opt/qti-aic/exec/qaic-compile"):
        BACKEND.compile(folder, OPTIONS)


def test_a_users_partition_is_used(tiny: Tiny, tmp_path: Path, stand_in: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(emit.tensor_slicing(4, 8)))
    options = Ai100Options(8, 40, 2, num_devices=4, flags={"mdp_load_partition_config": str(mine)})
    BACKEND.emit(tiny.module, tmp_path / "package", options)
    BACKEND.compile(tmp_path / "package", options)
    assert not list((tmp_path / "package").glob("mdp_ts_*"))
    assert (tmp_path / "package" / "mdp_load_partition_config.json").read_text() == mine.read_text()
