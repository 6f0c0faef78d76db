"""The guide in the README: its code runs as it stands, and does what the text says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from qeff_ir.errors import PassError
from qeff_ir.passing import base
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support

README = Path(__file__).parents[2] / "README.md"


def guide() -> list[str]:
    section = README.read_text().split("## Write your first pass in ten minutes\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    base.registered_passes()
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a module of a reader's, in which the guide's code runs."""
    module = types.ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)
    return module.__dict__


def run(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)


def test_the_guide_runs(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names["module"] = support.lowered("llama")
    for block in guide():
        run(block, names)
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "canonicalize",
        "fuse-gates",
        "widen-gates",
    ]
    assert [dict(r.stats.fired) for r in names["report"].runs[1:]] == [{"Swish": 2}, {"gate": 2}]


def test_the_guide_says_what_a_missed_site_looks_like(names: dict[str, Any]) -> None:
    run(guide()[0].replace("op.Mul(x, op.Sigmoid(x))", "op.Mul(op.Sigmoid(x), x)"), names)
    with pytest.raises(PassError) as error:
        run_pipeline(support.lowered("llama"), Pipeline.parse("canonicalize,fuse-gates"))
    assert str(error.value).splitlines()[0] == "pass fuse-gates: 2 of 2 sites were not rewritten:"
    assert str(error.value).splitlines()[2] == (
        "  model.layers.1.mlp.act_fn: Sigmoid 'val_136.1' [no-match] OpType mismatch: expected Sigmoid, got MatMul at "
        "MatMul 'linear_4.1' (rule 'Swish' matched 1 node up from Mul 'silu.1' and did not come to this node)"
    )
