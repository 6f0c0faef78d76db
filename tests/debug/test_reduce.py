"""Reduction keeps the failure, and what is left is about as large as the fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from qeff_ir.debug.bisect import bisect
from qeff_ir.debug.bundle import read_bundle
from qeff_ir.debug.drive import drive, make_plan
from qeff_ir.debug.reduce import PASSING, reduce, write_reduction
from qeff_ir.debug.replay import replay
from qeff_ir.errors import BundleError, RuntimeInputError
from qeff_ir.ir.ports import LOGITS
from qeff_ir.ir.snapshot import load_module
from qeff_ir.passing import Rewriter
from tests import support

from .test_bisect import FUSIONS, fail
from .wrong_passes import FAULT, FlippedSign, residuals


def test_a_numeric_failure_is_reduced_to_a_few_nodes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = fail(f"{FUSIONS},flipped-sign", tmp_path / "bundle", 4)
    said: list[str] = []
    found = reduce(bundle, say=said.append)
    assert capfd.readouterr().err == ""  # ONNX Runtime keeps to itself what it cannot run
    assert found.nodes[0] == len(bundle.module.graph) > 70
    assert len(residuals(found.failing)) >= 3  # the third is the wrong one
    assert found.nodes[1] <= 12
    assert found.trials <= 400
    assert said[-1].startswith(f"{found.nodes[1]} nodes: ")
    small = read_bundle(write_reduction(bundle, found, tmp_path / "small"))
    assert replay(small)[0]
    assert bisect(small).rewrite == 3
    assert found.passing is not None
    neighbor = load_module(tmp_path / "small" / PASSING / "model.onnx")
    names = [{n.outputs[0].name for n in m.graph} for m in (neighbor, found.failing)]
    assert names[0] < names[1]
    assert len(names[1] - names[0]) <= 2


def test_the_output_is_moved_to_the_fault(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where a property tells of the logits, which fall away."""
    bundle = fail(f"{FUSIONS},last-logits,flipped-sign", tmp_path / "bundle", 4)
    assert "last-logits" in bundle.module.properties
    found = reduce(bundle)
    assert found.nodes[1] == len(found.failing.graph) == FAULT
    (output,) = found.failing.graph.outputs
    assert output.producer() is residuals(found.failing)[FAULT - 1]
    assert found.trials < 60
    assert capfd.readouterr().err == ""


def test_a_crash_is_reduced_too(tmp_path: Path) -> None:
    bundle = fail("raises", tmp_path / "bundle", 1)
    found = reduce(bundle, trials=150)
    assert found.nodes[1] < found.nodes[0] // 4
    assert len(residuals(found.failing)) == 3


def test_a_bundle_that_does_not_fail_is_not_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fail("flipped-sign", tmp_path / "bundle", 4)
    monkeypatch.setattr(FlippedSign, "run", lambda *_: None)
    with pytest.raises(BundleError, match=r"^flipped-sign does not fail here as the bundle says: run 'qeff replay' to"):
        reduce(bundle)


def test_what_cannot_be_run_is_raised_and_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    module = support.canonical("llama")
    node = module.port(LOGITS).producer()
    assert node is not None and node.inputs[0] is not None
    b = Rewriter(module, "made").at(node)
    node.replace_input_with(0, b("Gather", node.inputs[0], b.const([10_000]), axis=1))
    with pytest.raises(RuntimeInputError, match="Gather"):
        drive(module, make_plan(module))
    assert capfd.readouterr().err == ""
