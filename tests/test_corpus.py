"""Bundles of what properties have found: each failed once, and must not again."""

from __future__ import annotations

from pathlib import Path

import pytest

from qeff_ir.debug.bundle import read_bundle
from qeff_ir.debug.replay import attempt, recorded
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.rewriter import Rewriter

CORPUS = sorted(p for p in (Path(__file__).parent / "corpus").iterdir() if p.is_dir())


@pytest.mark.parametrize("folder", CORPUS, ids=lambda p: p.name)
def test_what_was_found_stays_fixed(folder: Path) -> None:
    bundle = read_bundle(folder)
    data = bundle.metadata
    assert attempt(bundle.module, Pipeline.parse(data.suffix), data.check, seed=data.seed) is None
    assert attempt(bundle.start, Pipeline.parse(data.pipeline), data.check, seed=data.seed) is None


def test_the_corpus_tells_when_a_fix_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill test: without the rewrite that reports it, the change of opset fails as the bundle says."""
    bundle = read_bundle(next(p for p in CORPUS if p.name == "legalize-reports-nothing"))
    uncounted(monkeypatch)
    failure = attempt(bundle.module, Pipeline.parse(bundle.metadata.suffix), bundle.metadata.check)
    assert recorded(bundle).like(failure)


def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `legalize` change the opset without counting it, as it once did."""
    admitted = Rewriter.rewrite
    monkeypatch.setattr(Rewriter, "rewrite", lambda self, rule: rule == "opset" or admitted(self, rule))
