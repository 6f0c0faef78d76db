"""What the fuzz suite must tell: each kind of fault, planted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qeff_ir.errors import ModelLoadError, QeffError
from tests.fuzz import __main__ as command
from tests.fuzz import slices
from tests.fuzz.base import base
from tests.fuzz.damage import JUNK, Draw, junk
from tests.fuzz.families import FAMILIES, WrongError
from tests.fuzz.record import Record

_SAMPLE = 2000
"""Inputs of all families that run with the tests; `python -m tests.fuzz` runs 100,000."""


@pytest.fixture(scope="module")
def _sound(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the families damage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEFF_FUZZ", str(tmp_path_factory.mktemp("fuzz")))
        base()


@pytest.mark.usefixtures("_sound")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_sample_of_every_family_is_clean(family: str) -> None:
    outcome = slices.run(family, 20261129, math.ceil(_SAMPLE / len(FAMILIES)))
    assert outcome.faults == {}
    assert outcome.accepted > 0 and outcome.refused > 0
    assert outcome.inputs * len(FAMILIES) >= _SAMPLE


def _plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object]) -> slices.Outcome:
    def family(draw: Draw, folder: Path) -> None:
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


def _remove_outside(folder: Path) -> None:
    outside = os.open(folder.parents[1], os.O_RDONLY)
    with contextlib.suppress(FileNotFoundError):
        os.remove("nowhere", dir_fd=outside)
    os.close(outside)


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
        (_remove_outside, "os.remove of 'nowhere'"),
        (lambda _folder: os.system("true"), "os.system"),  # pyright: ignore[reportDeprecated]
        (_run_code, "code of the input runs"),
        (lambda _folder: bytearray(1 << 34), "MemoryError"),
    ],
)
def test_each_kind_of_fault_is_told(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object], says: str
) -> None:
    outcome = _plant(monkeypatch, fault)
    assert len(outcome.faults) == 1
    assert re.search(says, next(iter(outcome.faults)))


def test_what_is_made_and_removed_inside_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(_folder: Path) -> None:
        with tempfile.TemporaryDirectory() as made:  # removes what is in it by its name and an open folder
            (Path(made) / "config.json").write_text("{}")

    assert _plant(monkeypatch, act).faults == {}


@given(st.data())
def test_a_value_of_damage_is_an_input_s_own(data: st.DataObject) -> None:
    value = junk(data.draw)
    if isinstance(value, list | dict):
        assert not any(value is known for known in JUNK)


def _main(monkeypatch: pytest.MonkeyPatch, record: Path, *words: str) -> int:
    for name in ("QEFF_FUZZ", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("tests.fuzz.base.base", lambda: None)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--record", str(record), "--slice", "4", "--seed", "1", *words])
    return command.main()


def test_every_family_has_its_share_whatever_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A family with a fault is no reason to stay at it."""
    for name in list(FAMILIES):
        monkeypatch.delitem(FAMILIES, name)

    def sound(draw: Callable[[st.SearchStrategy[int]], int], folder: Path) -> None:
        draw(st.integers())

    def broken(draw: Callable[[st.SearchStrategy[int]], int], folder: Path) -> None:
        raise KeyError(draw(st.integers()))

    monkeypatch.setitem(FAMILIES, "sound", sound)
    monkeypatch.setitem(FAMILIES, "broken", broken)
    record = tmp_path / "record.json"
    assert _main(monkeypatch, record, "--inputs", "20") == 1
    found = json.loads(record.read_text())
    assert [s["accepted"] for s in found["sound"]] == [4, 4, 2]
    assert [sum(s["faults"].values()) for s in found["broken"]] == [4, 4, 2]
    monkeypatch.delitem(FAMILIES, "broken")
    assert _main(monkeypatch, record, "--inputs", "12") == 0
    sound_slices = json.loads(record.read_text())["sound"]
    assert [s["accepted"] for s in sound_slices] == [4, 4, 2, 2]
    assert len({s["seed"] for s in sound_slices}) == 4  # not those of the first run again


def test_an_input_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_CPU_SECONDS", 0.2)
    monkeypatch.setattr(slices, "_SECONDS", 5.0)
    outcome = _plant(monkeypatch, _endless)
    assert set(outcome.faults) == {"it does not end, in tests/fuzz/test_fuzz.py:_endless"}


def test_a_slice_is_the_same_each_time_and_other_seeds_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def family(draw: Draw, folder: Path) -> None:
        raise KeyError(draw(st.integers(0, 1 << 60)))

    monkeypatch.setitem(FAMILIES, "planted", family)
    runs = [slices.run("planted", start, 20).faults for start in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) > 10


def test_a_fault_is_replayed_by_its_family_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def family(draw: Draw, folder: Path) -> None:
        number = draw(st.integers(0, 1 << 60))
        if number > 1 << 20:
            raise KeyError(number)

    monkeypatch.setitem(FAMILIES, "planted", family)
    assert slices.run("planted", 1, 20).faults
    with pytest.raises(slices.FaultError, match=rf"KeyError .*: {(1 << 20) + 1}\b"):  # the smallest one
        slices.replay("planted", 1, 20)


def test_the_record_counts_clean_slices_only(tmp_path: Path) -> None:
    record = Record()
    record.add("onnx", 1, slices.Outcome(accepted=3, refused=4, seconds=1.0))
    record.add("onnx", 2, slices.Outcome(accepted=3, refused=4, faults={"KeyError": 2}, seconds=1.0))
    record.save(tmp_path / "record.json")
    again = Record.load(tmp_path / "record.json")
    assert again == record
    assert (again.inputs("onnx"), again.seconds("onnx")) == (7, 2.0)
    assert "| onnx | 7 | 3 | 4 | 1 |" in (tmp_path / "record.md").read_text()
