"""What the fuzz suite must tell: each kind of fault, planted."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from hypothesis import strategies as st

from qeff_ir.errors import ModelLoadError, QeffError
from tests.fuzz import slices
from tests.fuzz.families import FAMILIES, WrongError
from tests.fuzz.record import Record


def _plant(monkeypatch: pytest.MonkeyPatch, fault) -> slices.Outcome:
    def family(draw, folder: Path) -> None:
        number = draw(st.integers(0, 1000))
        (folder / "input").write_text(str(number))
        if number > 100:
            raise ModelLoadError("refused")
        fault(folder)

    monkeypatch.setitem(FAMILIES, "planted", family)
    return slices.run("planted", 1, 100)


def _raise(error: BaseException):
    def act(_folder: Path) -> None:
        raise error

    return act


def _run_code(folder: Path) -> None:
    exec(compile("1 + 1", str(folder / "evil.py"), "exec"))


def _endless(_folder: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_raise(KeyError("x")), "KeyError in tests/fuzz/test_fuzz.py"),
        (_raise(RecursionError()), "RecursionError"),
        (_raise(WrongError("other bytes")), "other bytes"),
        (_raise(QeffError("")), "without a sentence"),
        (lambda _folder: os.kill(os.getpid(), signal.SIGKILL), "the process ended at input .*: signal 9"),
        (lambda folder: (folder.parents[1] / "planted.txt").write_text(""), "planted.txt.* is opened for writing"),
        (lambda folder: (folder.parents[1] / "planted").mkdir(exist_ok=True), "os.mkdir of .*planted"),
        (lambda _folder: os.system("true"), "os.system"),
        (_run_code, "code of the input runs"),
        (lambda _folder: bytearray(1 << 34), "MemoryError"),
    ],
)
def test_each_kind_of_fault_is_told(monkeypatch: pytest.MonkeyPatch, fault, says: str) -> None:
    outcome = _plant(monkeypatch, fault)
    assert len(outcome.faults) == 1
    assert re.search(says, next(iter(outcome.faults)))


def test_an_input_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_CPU_SECONDS", 0.2)
    monkeypatch.setattr(slices, "_SECONDS", 5.0)
    outcome = _plant(monkeypatch, _endless)
    assert set(outcome.faults) == {"it does not end, in tests/fuzz/test_fuzz.py:_endless"}


def test_a_slice_is_the_same_each_time_and_other_seeds_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def family(draw, folder: Path) -> None:
        raise KeyError(draw(st.integers(0, 1 << 60)))

    monkeypatch.setitem(FAMILIES, "planted", family)
    runs = [slices.run("planted", start, 20).faults for start in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) > 10


def test_the_record_counts_clean_slices_only(tmp_path: Path) -> None:
    record = Record()
    record.add("onnx", 1, slices.Outcome(accepted=3, refused=4, seconds=1.0))
    record.add("onnx", 2, slices.Outcome(accepted=3, refused=4, faults={"KeyError": 2}, seconds=1.0))
    record.save(tmp_path / "record.json")
    again = Record.load(tmp_path / "record.json")
    assert again == record
    assert (again.inputs("onnx"), again.seconds("onnx")) == (7, 2.0)
    assert "| onnx | 7 | 3 | 4 | 1 |" in (tmp_path / "record.md").read_text()
