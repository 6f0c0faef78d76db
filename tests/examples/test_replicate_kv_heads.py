"""Heads that are copied, from outside: both targets answer as before, with caches of more heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from qeff_ir.errors import PassError
from qeff_ir.passing import Pipeline, Rewriter, run_pipeline
from qeff_ir.passing.weights import repeated, stored
from qeff_ir.testing.kit import NotHeldError, hold_package, hold_pass, planted
from tests import support
from tests.examples.replicate_kv_heads import ReplicateKvHeads


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize(("name", "heads"), [("llama", [4, 4, 4, 4]), ("gemma3", [4, 4, 4, 4, 4, 4])])
def test_it_answers_as_before(name: str, heads: list[int], target: str, tmp_path: Path) -> None:
    module = support.canonical(name)
    report = run_pipeline(module, Pipeline.parse(support.rest_of(target)).add(ReplicateKvHeads()), check=2)
    (run,) = [run for run in report.runs if run.id == "replicate-kv-heads"]
    assert (run.sites, run.stats.missed) == (len(heads) // 2, [])
    assert [state.shape[1] for state in module.states] == heads
    support.answers_alike(module, support.canonical(name), target, tmp_path)


def test_it_holds_on_drawn_decoders_and_says_what_it_leaves_alone() -> None:
    held = hold_pass(ReplicateKvHeads(), examples=30)
    assert held.fired["heads"] > 0
    assert any("query heads are not divided" in reason for reason in held.missed)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_packages_hold(target: str) -> None:
    assert hold_package(ReplicateKvHeads(), target=target, examples=12).changed > 0


def test_heads_in_another_order_are_told() -> None:
    wrong = "np.concatenate([blocks] * times, axis=axis)"
    with planted(repeated, "np.repeat(blocks, times, axis=axis)", wrong), pytest.raises(NotHeldError):
        hold_pass(ReplicateKvHeads(), examples=30, shrink=False)


def test_features_that_are_not_blocks_are_refused() -> None:
    module = support.canonical("llama")
    weight = next(found for node in module.graph if (found := stored(node)) is not None)
    with pytest.raises(PassError, match="has 32 features: they are not blocks of 5"):
        repeated(Rewriter(module, "test"), "x", weight.value, 0, 5, 2)
