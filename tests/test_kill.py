"""A sample of the kill suite; `python -m tests.kill` plants every fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kill.faults import FAULTS, PROPERTIES, Fault

ROOT = Path(__file__).parents[1]
SAMPLE = ["ring one slot short", "states of two layers swapped", "first token's logits"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "-"))
def test_every_fault_stands_in_the_source_as_it_is(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.by in PROPERTIES


def test_there_are_many_faults_everywhere() -> None:
    assert len(FAULTS) >= 40
    assert len({f.name for f in FAULTS}) == len(FAULTS)
    places = {f.file.rpartition("/")[0] for f in FAULTS}
    assert {"passes", "qeff_ir/frontend", "qeff_ir/runtime", "backends/ai100", "backends/onnxruntime"} <= places


def test_a_sample_of_the_faults_is_told() -> None:
    command = [sys.executable, "-m", "tests.kill", "--unchecked", "--only", *SAMPLE]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(SAMPLE)} of {len(SAMPLE)} faults told" in run.stdout


def test_a_fault_that_changes_nothing_is_reported_as_alive() -> None:
    """The kill test of the kill suite."""
    code = (
        "import sys; from tests.kill import __main__ as kill, faults;"
        "nothing = ('harmless', 'qeff_ir/verifier.py', 'def verify(', 'def verify(', 'P4 verifier');"
        "kill.FAULTS[:] = [faults.Fault(*nothing)];"
        "sys.argv[1:] = ['--unchecked']; sys.exit(kill.main())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "survived: qeff_ir/verifier.py: harmless" in run.stdout
