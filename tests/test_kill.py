"""A sample of the kill suite; `python -m tests.kill` plants every fault."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kill.edit import EditError, find, replaced
from tests.kill.table import FAULTS, PROPERTIES, Fault

ROOT = Path(__file__).parents[1]
SAMPLE = ["ring one slot short", "states of two layers swapped", "first token's logits"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "-"))
def test_every_fault_stands_in_the_source_as_it_is(fault: Fault) -> None:
    place = find(ROOT, fault.where)
    text = (ROOT / place.file).read_text()
    assert ast.dump(ast.parse(replaced(text, place.inner, fault.old, fault.new))) != ast.dump(ast.parse(text))
    assert fault.by in PROPERTIES


@pytest.mark.parametrize("where", PROPERTIES.values(), ids=PROPERTIES.keys())
def test_every_property_is_there(where: str) -> None:
    """One that is not would be no test, and a copy without a result counts as told."""
    path, _, name = where.partition("::")
    file, test = ROOT / "tests" / path, name.partition("::")[0].partition("[")[0]
    assert file.exists()
    assert not test or re.search(rf"(def|class) {test}\b|\b{test} =", file.read_text())


def test_there_are_many_faults_everywhere() -> None:
    assert len(FAULTS) >= 40
    assert len({f.name for f in FAULTS}) == len(FAULTS)
    folders = {find(ROOT, f.where).file.parent.as_posix() for f in FAULTS}
    assert {"passes", "qeff_ir/frontend", "qeff_ir/runtime", "backends/ai100", "backends/onnxruntime"} <= folders
    assert {"qeff_ir", "qeff_ir/adapters", "qeff_ir/auto", "qeff_ir/cli"} <= folders


_SOURCE = """
class A:
    def run(self, x):
        y = f(x, 1)   # a comment
        return g(y) + g(
            y, 2)

def run(x):
    return f(x, 1)
"""


@pytest.mark.parametrize(
    ("inner", "old", "new", "made"),
    [
        (("A", "run"), "f(x,  1)", "f(x, 2)", "y = f(x, 2)"),
        (("A", "run"), "g(y, 2)", "h", "return g(y) + h"),
        (("A", "run"), "y = f(x, 1)\nreturn g(y) + g(y, 2)", "return 5", "return 5"),
        (("run",), "return f(x, 1)", "pass", "pass"),
    ],
)
def test_an_edit_finds_a_piece_of_syntax_however_it_is_laid_out(
    inner: tuple[str, ...], old: str, new: str, made: str
) -> None:
    assert made in replaced(_SOURCE, inner, old, new)


@pytest.mark.parametrize(
    ("inner", "old", "new", "says"),
    [
        ((), "f(x, 1)", "f(x, 2)", "2 times"),
        (("A",), "f(x, 3)", "f(x, 2)", "0 times"),
        (("A", "run"), "f(x, 1)", "f(x,1)", "what stands there"),
    ],
)
def test_an_edit_that_is_not_one_edit_is_refused(inner: tuple[str, ...], old: str, new: str, says: str) -> None:
    with pytest.raises(EditError, match=says):
        replaced(_SOURCE, inner, old, new)


@pytest.mark.parametrize(("where", "count"), [("run", "names [0-9]{2,}"), ("passes.attention.nothing", "names 0")])
def test_a_place_is_one_place(where: str, count: str) -> None:
    with pytest.raises(EditError, match=count):
        find(ROOT, where)


def test_a_sample_of_the_faults_is_told() -> None:
    command = [sys.executable, "-m", "tests.kill", "--unchecked", "--only", *SAMPLE]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(SAMPLE)} of {len(SAMPLE)} faults told" in run.stdout


def test_a_fault_that_changes_nothing_is_reported_as_alive() -> None:
    """The kill test of the kill suite."""
    code = (
        "import sys; from tests.kill import __main__ as kill, table;"
        "edit = ('_check_flow(module)', '_check_flow(module) or None');"
        "harmless = ('harmless', 'verifier.verify', *edit, 'P4 verifier', 'ir');"
        "kill.FAULTS[:] = [table.Fault(*harmless)];"
        "sys.argv[1:] = ['--unchecked']; sys.exit(kill.main())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "survived: verifier.verify: harmless" in run.stdout
