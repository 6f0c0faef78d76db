"""The nightly run counts what ran, goes on where it stopped, and tells of what failed (its kill test)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nightly.record import Property, Record, Slice

ROOT = Path(__file__).parents[1]
PLANTED = """
import pytest
from hypothesis import given, settings, strategies as st

@given(st.integers())
def test_sound(number):
    assert number == number

@given(st.booleans())
def test_two_examples(flag):
    assert flag in (True, False)

@pytest.mark.parametrize("least", [1, 2])
@given(st.integers(0, 2**16))
def test_wrong(least, number):
    assert number < LIMIT

def test_all():
    assert True
"""


def nightly(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    lies = ["--record", str(folder / "record.json"), "--tests", str(folder), "--output", str(folder / "out")]
    command = [sys.executable, "-m", "tests.nightly", "--examples", "40", "--slice", "30", *lies, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_a_run_counts_resumes_and_tells_of_a_planted_fault(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    planted.write_text(f"{PLANTED}\nLIMIT = 100\n")
    first = nightly(tmp_path)
    assert first.returncode == 1, first.stdout + first.stderr
    record = Record.load(tmp_path / "record.json")
    found = {name.partition("::")[2]: item for name, item in record.properties.items()}
    sound, wrong = found["test_sound"], found["test_wrong"]
    assert [s.examples for s in sound.slices] == [30, 10] and len({s.seed for s in sound.slices}) == 2
    assert [s.examples for s in found["test_two_examples"].slices] == [2]  # there are no others, and it says so
    assert found["test_all"].slices[0].tests == 1 and not found["test_all"].drawn
    assert wrong.cases == 2 and wrong.failing and wrong.examples == 0
    assert "test_wrong[1]" in wrong.slices[0].failures[0] and len(wrong.slices) == 1
    assert "test_planted.py::test_wrong | 0 | 2 |" in (tmp_path / "record.md").read_text()
    (report,) = (tmp_path / "out").glob("test_planted.py-test_wrong-*/report.txt")
    assert "number=100" in report.read_text()  # as small as can be

    planted.write_text(f"{PLANTED}\nLIMIT = 2**17\n")
    second = nightly(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    again = Record.load(tmp_path / "record.json")
    fixed = again.properties["test_planted.py::test_wrong"]
    assert [s.examples for s in fixed.slices[1:]] == [30, 10] and not fixed.failing
    assert fixed.slices[0] == wrong.slices[0]
    assert {n: p for n, p in again.properties.items() if "wrong" not in n} == {
        n: p for n, p in record.properties.items() if "wrong" not in n
    }


def test_what_is_left_counts_no_slice_that_failed() -> None:
    good, bad = Slice(1, 30, 0, 1, 0.5, "abc"), Slice(2, 30, 0, 1, 0.5, "abc", ("it is wrong",))
    assert Property(True, 1, [good, bad]).left(50) == 20
    assert Property(False, 3, [bad]).left(50) == 1 and Property(False, 3, [bad, good]).left(50) == 0


def test_a_record_is_of_one_set_of_versions(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_planted.py").write_text(f"{PLANTED}\nLIMIT = 2**17\n")
    Record(40, {"hypothesis": "0"}).save(tmp_path / "record.json")
    run = nightly(tmp_path)
    assert run.returncode == 2
    assert "start again with --anew" in run.stderr


@pytest.mark.parametrize("share", [0.04, 1.0])
def test_a_nightly_run_asks_for_all_examples(share: float) -> None:
    code = (
        "import tests.conftest;from tests.properties import scaled;from hypothesis import given,strategies as st;"
        f"f=scaled({share})(given(st.integers())(lambda n: None));"
        "print(f._hypothesis_internal_use_settings.max_examples)"
    )
    given = {**os.environ, "PYTHONPATH": str(ROOT), "HYPOTHESIS_PROFILE": "nightly", "QEFF_EXAMPLES": "123"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True)
    assert run.stdout.strip() == "123", run.stderr
