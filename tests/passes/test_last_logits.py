"""Logits of the last tokens: drafts that are accepted, and drafts that are rejected, on both targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import find_backend
from passes.last_logits import LastLogits, _last_columns
from qeff_ir.arrays import Array
from qeff_ir.errors import PassError, RuntimeInputError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import Run
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.runs import logits_of
from qeff_ir.runtime.session import Session
from qeff_ir.testing.kit import NotHeldError, hold_package, hold_pass, planted
from tests import support

K = 3
UNDRAWN = 6
"""More tokens than the chunks of drawn requests have."""


def with_drafts(target: str, k: int = K) -> Pipeline:
    return Pipeline.parse(find_backend(target).pipeline).with_options("last-logits", keep=k)


def opened(name: str, target: str, folder: Path, *, check: int = 2) -> tuple[Module, Session]:
    module, backend = support.canonical(name), find_backend(target)
    run_pipeline(module, with_drafts(target), check=check)
    backend.check(module, support.OPTIONS)
    backend.emit(module, folder, support.OPTIONS)
    return module, backend.open(folder, threads=1)


def whole(name: str, rows: list[list[int]]) -> list[Array]:
    """What transformers says of each token of each row."""
    return [np.stack([support.forward(name, row[: i + 1]) for i in range(len(row))]) for row in rows]


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_drafts_are_verified_and_those_that_are_rejected_are_overwritten(
    name: str, target: str, tmp_path: Path
) -> None:
    """Rows accept different numbers of drafts, over more steps than a ring has slots."""
    _, session = opened(name, target, tmp_path)
    random, length = np.random.default_rng(0), 40
    rows = random.integers(1, 97, (2, length)).tolist()
    expected = whole(name, rows)
    prompt, done = Run(np.array([r[:8] for r in rows]), np.tile(np.arange(8), (2, 1))), np.array([8, 8])
    found = logits_of(session, prompt)[:, 0]
    np.testing.assert_allclose(found, [e[7] for e in expected], atol=1e-4)
    rejected = 0
    while (done + K <= length).all():
        accepted = random.integers(0, K, 2)
        tokens = np.array([r[d : d + K] for r, d in zip(rows, done, strict=True)])
        for row, count in enumerate(accepted):
            tokens[row, 1 + count :] = (tokens[row, 1 + count :] + 1) % 97  # the draft is wrong from here on
        rejected += int((K - 1 - accepted).sum())
        found = logits_of(session, Run(tokens, done[:, None] + np.arange(K), keep=K))
        assert found.shape == (2, K, 97)
        for row, count in enumerate(accepted):
            at = int(done[row])
            np.testing.assert_allclose(found[row, : count + 1], expected[row][at : at + count + 1], atol=1e-4)
            if count < K - 1:
                assert np.abs(found[row, count + 1] - expected[row][at + count + 1]).max() > 1e-3
        done = done + 1 + accepted
    assert rejected > 10


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_a_decoder_without_drafts_answers_as_before(target: str, tmp_path: Path) -> None:
    module, session = opened("llama", target, tmp_path / "own", check=4)
    assert [(s.phase, s.symbols["seq_len"], s.symbols["num_logits_to_keep"]) for s in module.specializations] == [
        ("prefill", 8, 1),
        ("decode", K, K),
    ]
    plain, own = support.open_decoder(support.canonical("llama"), tmp_path / "plain"), Decoder(session)
    np.testing.assert_allclose(own.prefill(support.PROMPTS), plain.prefill(support.PROMPTS), atol=1e-5)
    for _ in range(4):
        np.testing.assert_allclose(own.decode([5, 6]), plain.decode([5, 6]), atol=1e-5)
    with pytest.raises(RuntimeInputError, match="a run of 2 rows and seq_len=4, num_logits_to_keep=4"):
        logits_of(session, Run(np.zeros((2, 4), np.int64), np.tile(np.arange(4), (2, 1)), keep=4))


def test_a_model_that_cannot_go_back_decodes_one_token_at_a_time() -> None:
    module = support.canonical("qwen3-next")
    report = run_pipeline(module, with_drafts("onnxruntime"))
    assert [s.symbols["seq_len"] for s in module.specializations] == [8, 1]
    run = next(run for run in report.runs if run.id == "last-logits")
    assert any("no draft can be taken back: conv_state.0" in missed.reason for missed in run.stats.missed)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_it_holds_on_drawn_decoders(target: str) -> None:
    item, pipeline = LastLogits(UNDRAWN), with_drafts(target, UNDRAWN)
    assert hold_pass(item, target=target, pipeline=pipeline, examples=20).changed > 0
    assert hold_package(item, target=target, pipeline=pipeline, examples=12).changed > 0


def test_other_tokens_are_told() -> None:
    old = 'b("Sub", b("Add", last, b.const(1)), count)'
    with planted(_last_columns, old, 'b("Sub", last, count)'), pytest.raises(NotHeldError):
        hold_package(LastLogits(UNDRAWN), pipeline=with_drafts("onnxruntime", UNDRAWN), examples=12, shrink=False)


ALL_LAST = (
    'b("Add", first, steps, shape=["batch_size", symbol], dtype=ir.DataType.INT64)',
    'b("Max", last, b("Add", first, steps), shape=["batch_size", symbol], dtype=ir.DataType.INT64)',
)
"""Every draft has the logits of the last, which are right."""


def test_logits_of_drafts_alone_are_told_by_the_kit() -> None:
    pipeline = with_drafts("onnxruntime", UNDRAWN)
    for hold in (hold_pass, hold_package):
        with planted(_last_columns, *ALL_LAST), pytest.raises(NotHeldError):
            hold(LastLogits(UNDRAWN), pipeline=pipeline, examples=12, shrink=False)


def test_logits_of_drafts_alone_are_told_by_the_numeric_check() -> None:
    with (
        planted(_last_columns, *ALL_LAST),
        pytest.raises(PassError, match=r"pass last-logits: .*'logits of a draft' of run \d+ differs"),
    ):
        run_pipeline(support.canonical("llama"), with_drafts("onnxruntime"), check=4)


def test_drafts_as_long_as_a_prefill_run_are_refused() -> None:
    """Hosts take each run of another length than the prefill's for one of drafts."""
    with pytest.raises(PassError, match="8 tokens are also the length of a prefill run"):
        run_pipeline(support.canonical("llama"), with_drafts("ai100", 8))
