"""The drift of fast packages: what is measured is what was done to the numbers, and exact packages have none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from qeff_ir.debug.drift import built_in_text, drift, fast_parts, measure_drift, pieces
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.package import Manifest, ProgramRecord
from qeff_ir.passing import base
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.properties import FAST
from tests import support

LOGITS = np.random.default_rng(0).standard_normal((2, 12, 7)).astype(np.float32)
FOLLOWING = np.random.default_rng(1).integers(0, 7, (2, 12))


@dataclass(frozen=True, slots=True)
class Coarse(Pass):
    """Round the weights to so many steps of their largest number."""

    name: ClassVar[str] = "coarse"
    establishes: ClassVar[frozenset[str]] = frozenset({FAST})
    changes_weights: ClassVar[bool] = True
    steps: int = 7

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for value in module.graph.initializers.values():
            if WEIGHT_KEY in value.metadata_props and value.const_value is not None and len(value.shape or ()) == 2:
                numbers = value.const_value.numpy()
                scale = np.abs(numbers).max() / self.steps
                value.const_value = ir.tensor((np.round(numbers / scale) * scale).astype(np.float32), name=value.name)


def odds(logits: Any) -> Any:
    made = np.exp(logits.astype(np.float64))
    return made / made.sum(-1, keepdims=True)


def test_equal_logits_drift_by_nothing() -> None:
    found = drift(LOGITS, LOGITS, FOLLOWING, 1.0)
    assert (found.tokens, found.agreement, found.divergence) == (24, 1.0, 0.0)
    chosen = np.take_along_axis(odds(LOGITS), FOLLOWING[:, :, None], -1)
    assert found.perplexity == found.reference == pytest.approx(np.exp(-np.log(chosen).mean()), rel=1e-12)


def test_the_divergence_and_the_choices_are_those_of_the_definition() -> None:
    other = LOGITS * np.float32(0.5)
    other[0, 3] = -LOGITS[0, 3]  # one other first choice
    found, p, q = drift(other, LOGITS, FOLLOWING, 1.0), odds(LOGITS), odds(other)
    assert found.agreement == 23 / 24
    assert found.divergence == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-9)
    assert abs(found.divergence / (q * np.log(q / p)).sum(-1).mean() - 1) > 1e-3  # which is another number
    assert found.perplexity != found.reference == drift(LOGITS, LOGITS, FOLLOWING, 1.0).perplexity


@pytest.mark.parametrize("wrong", [np.zeros_like(LOGITS), np.full_like(LOGITS, np.nan)])
def test_what_means_nothing_is_not_compared(wrong: Any) -> None:
    for ours, theirs in ((wrong, LOGITS), (LOGITS, wrong)):
        with pytest.raises(ValueError, match="constant or not finite"):
            drift(ours, theirs, FOLLOWING, 1.0)


def test_texts_are_cut_from_their_start() -> None:
    assert pieces(range(20), 2, 8) == [[*range(8)], [*range(8, 16)]]
    assert pieces(range(20), 2, 80) == [[*range(10)], [*range(10, 20)]]
    with pytest.raises(ValueError, match="too short for 2 rows"):
        pieces(range(7), 2, 8)


def test_a_package_says_what_makes_it_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._REGISTRY, Coarse.name, Coarse)
    compiled, emitted = (
        Manifest("ai100", "", done, {"mxfp6_matmul": True, "mxint8_kv_cache": False, "num_cores": 16}, {})
        for done in (True, False)
    )
    assert fast_parts(compiled) == ["the option mxfp6_matmul"]
    assert fast_parts(emitted) == []  # the emulator computes with the weights as they are
    emitted.programs["main"] = ProgramRecord("tiny", {"pipeline": "canonicalize,coarse{steps=3},unflatten"})
    assert fast_parts(emitted) == ["the pass coarse"]


def test_a_text_comes_along() -> None:
    text = built_in_text()
    assert len(text) > 3_000 and text.count(" ") > 400
    assert len(pieces(text.encode(), 3, 128)) == 3


def test_a_session_drifts_by_what_was_done_to_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finer the steps, the less; with the weights as they are, by rounding alone."""
    monkeypatch.setitem(base._REGISTRY, Coarse.name, Coarse)
    model, rest, found = support.tiny("llama")[1], support.rest_of("onnxruntime"), list[float]()
    rows = support.prompts([24, 24], seed=5)
    for pipeline in (f"coarse{{steps=3}},{rest}", f"coarse{{steps=31}},{rest}", rest):
        decoder = support.open_decoder(support.canonical("llama"), tmp_path / str(len(found)), pipeline)
        measured = measure_drift(decoder, model, rows)
        found.append(measured.divergence)
        assert measured.tokens == 24 and measured.rate > 0
    assert found[0] > 5 * found[1] > 1000 * abs(found[2])
    with pytest.raises(ValueError, match="one length"):
        measure_drift(decoder, model, [[1, 2, 3, 4], [1, 2]])
