"""Bisection names the pass and the rewrite, unattended."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from qeff_ir.debug.bisect import bisect
from qeff_ir.debug.bundle import Bundle, read_bundle
from qeff_ir.debug.capture import Capture
from qeff_ir.debug.equivalence import Equivalence
from qeff_ir.errors import BundleError, EquivalenceError, PassError
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.instrument import Instrument
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support

FUSIONS = "fuse-norms,fuse-rotary,fuse-activations"


def fail(pipeline: str, folder: Path, check: int) -> Bundle:
    """The bundle of a pipeline that fails."""
    module, capture = support.canonical("llama"), Capture(folder, check=check)
    instruments: list[Instrument] = [Equivalence(), capture] if check == 4 else [capture]
    with pytest.raises((PassError, ValueError)):
        run_pipeline(module, Pipeline.parse(pipeline), instruments=instruments, check=check)
    return read_bundle(folder)


def test_a_sign_flipped_in_the_third_rewrite_of_four_is_found(tmp_path: Path) -> None:
    bundle = fail(f"{FUSIONS},flipped-sign,{support.rest_of('onnxruntime').split(',', 3)[3]}", tmp_path / "bundle", 4)
    said: list[str] = []
    culprit = bisect(bundle, say=said.append)
    assert (culprit.pass_id, culprit.rewrite, culprit.rule) == ("flipped-sign", 3, "add-to-sub")
    assert culprit.failure.error == EquivalenceError.__name__
    assert culprit.sources == ["model.layers.1"]
    assert culprit.change is not None
    assert [(c.kind, c.op) for c in culprit.change.nodes if c.kind != "rewired"] == [
        ("removed", "Add"),
        ("added", "Sub"),
    ]
    assert culprit.difference is not None
    assert (culprit.difference.op, culprit.difference.source) == ("Sub", "model.layers.1")
    assert said == [
        "flipped-sign with 0 rewrites: good",
        "flipped-sign with 1 rewrite: good",
        "flipped-sign with 2 rewrites: good",
        "flipped-sign with 4 rewrites: bad",
        "flipped-sign with 3 rewrites: bad",
    ]


def test_a_pass_that_raises_is_bisected_by_its_error(tmp_path: Path) -> None:
    culprit = bisect(fail(f"{FUSIONS},raises", tmp_path / "bundle", 1))
    assert (culprit.pass_id, culprit.rewrite, culprit.rule, culprit.change) == ("raises", 3, "again", None)
    assert str(culprit) == "raises, rewrite 3 (again): the third is too much"


def test_a_fault_before_the_first_rewrite_is_said_to_be_one(tmp_path: Path) -> None:
    culprit = bisect(fail("breaks-facts", tmp_path / "bundle", 1))
    assert culprit.rewrite is None
    assert str(culprit).startswith("breaks-facts fails before its first rewrite: pass breaks-facts: [state-pair] ")


def test_a_site_left_over_is_the_fault_of_no_rewrite(tmp_path: Path) -> None:
    culprit = bisect(fail("leaves-one", tmp_path / "bundle", 1))
    assert (culprit.rewrite, culprit.whole) == (None, True)
    assert str(culprit).startswith(
        "leaves-one as a whole, none of its rewrites: pass leaves-one: 1 of 9 sites were not rewritten:\n  model.norm: "
    )


def test_the_second_use_of_a_pass_keeps_its_name(tmp_path: Path) -> None:
    """In the bundle's suffix it is the first."""
    bundle = fail("flipped-sign,flipped-sign", tmp_path / "bundle", 4)
    assert bundle.metadata.pass_id == "flipped-sign"
    module, capture = support.canonical("llama"), Capture(tmp_path / "second", check=1)
    with pytest.raises(ValueError, match="the third"):
        run_pipeline(module, Pipeline.parse("fuse-norms,fuse-norms,raises"), instruments=[capture])
    assert bisect(read_bundle(tmp_path / "second")).pass_id == "raises"


def test_a_command_finds_the_pass_that_makes_what_it_dislikes(tmp_path: Path) -> None:
    bundle = fail(f"{FUSIONS},flipped-sign,fuse-norms,breaks-facts", tmp_path / "bundle", 1)
    script = tmp_path / "check.sh"
    script.write_text('#!/bin/sh\n! grep -q -a Swish "$1/model.onnx"\n')
    script.chmod(0o755)
    said: list[str] = []
    culprit = bisect(bundle, command=str(script), say=said.append)
    assert (culprit.pass_id, culprit.rewrite, culprit.rule) == ("fuse-activations", 1, "Swish")
    assert culprit.failure.message == "the command fails with code 1"
    assert said[0] == "the first 3 passes, up to fuse-activations: bad"


def test_a_command_gets_the_folder_as_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder for temporary files is called."""
    bundle = fail(f"{FUSIONS},breaks-facts", tmp_path / "bundle", 1)
    odd = tmp_path / f"a b; touch {tmp_path.name}-ran"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    script = tmp_path / "check.sh"
    script.write_text('#!/bin/sh\n[ $# = 1 ] && [ -f "$1/model.onnx" ]\n')
    script.chmod(0o755)
    with pytest.raises(BundleError, match=r"^the command accepts the result of the whole pipeline"):
        bisect(bundle, command=str(script))


def test_a_pass_that_fails_for_another_ones_fault_is_told_from_it(tmp_path: Path) -> None:
    """Level 1 does not look at the numbers: the flipped sign is only found by asking for them."""
    bundle = fail(f"{FUSIONS},flipped-sign,fuse-norms,breaks-facts", tmp_path / "bundle", 1)
    assert bundle.metadata.pass_id == "breaks-facts"
    said: list[str] = []
    culprit = bisect(bundle, say=said.append)
    assert (culprit.pass_id, culprit.rewrite, culprit.rule) == ("flipped-sign", 3, "add-to-sub")
    assert culprit.sources == ["model.layers.1"]
    assert said[:4] == [
        "the numbers before breaks-facts: bad",
        "breaks-facts may be a victim: bisect again once the pass found here is mended",
        "the first 2 passes, up to fuse-rotary: good",
        "the first 3 passes, up to fuse-activations: good",
    ]
    said.clear()
    culprit = bisect(fail(f"{FUSIONS},raises", tmp_path / "own", 1), say=said.append)
    assert (culprit.pass_id, said[0]) == ("raises", "the numbers before raises: good")


def test_a_command_that_fails_on_everything_or_nothing_is_refused(tmp_path: Path) -> None:
    bundle = fail("fuse-norms,breaks-facts", tmp_path / "bundle", 1)
    with pytest.raises(BundleError, match=r"^the command fails already on the module before the pipeline: no pass is"):
        bisect(bundle, command="false")
    # without the structural check, nothing but the command judges
    with pytest.raises(BundleError, match=r"^the command accepts the result of the whole pipeline: there is nothing"):
        bisect(bundle, command="true")


def test_a_bundle_that_does_not_fail_any_more_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .wrong_passes import FlippedSign

    bundle = fail("flipped-sign", tmp_path / "bundle", 4)
    monkeypatch.setattr(FlippedSign, "run", lambda *_: None)
    with pytest.raises(BundleError, match=r"^flipped-sign does not fail here as the bundle says: run 'qeff replay' to"):
        bisect(bundle)


def test_a_pass_that_goes_past_its_rewriter_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from .wrong_passes import Raises

    def fail_when_unbound(self: Raises, module: Module, rewriter: Rewriter) -> None:
        if all(rewriter.rewrite("again") for _ in range(40)):
            raise ValueError("more than any budget")

    monkeypatch.setattr(Raises, "run", fail_when_unbound)
    monkeypatch.setattr("qeff_ir.debug.bisect._MOST", 32)
    bundle = fail("raises", tmp_path / "bundle", 1)
    with pytest.raises(BundleError) as error:
        bisect(bundle)
    assert str(error.value) == "raises fails only without a budget: it changes the graph past its rewriter"
