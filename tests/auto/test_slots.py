"""Packages whose runs name the rows of the caches (`full_batch_size`): more prompts than slots, on both targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, TextStreamer

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.demo import MODEL_FOLDER, problems
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.jobs import Job

TOKENIZER: Any = AutoTokenizer.from_pretrained(MODEL_FOLDER)
PROMPTS, ANSWERS = (list(part) for part in zip(*problems()[:5], strict=True))


@pytest.fixture(scope="module", params=["onnxruntime", "ai100"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForCausalLM:
    """Two jobs at a time, and three slots."""
    made, folder = QEFFAutoModelForCausalLM.from_pretrained(MODEL_FOLDER), tmp_path_factory.mktemp("slots") / "three"
    made.compile(
        target=request.param, prefill_seq_len=8, ctx_len=96, full_batch_size=2, kv_cache_batch_size=3,
        compile_dir=folder, emit_only=True,
    )  # fmt: skip
    return made


def test_more_prompts_than_slots_are_answered_in_order(model: QEFFAutoModelForCausalLM) -> None:
    result = model.generate(prompts=PROMPTS, tokenizer=TOKENIZER)
    assert result.generated_texts == ANSWERS
    assert len(result.timings) == 1
    assert 0 < result.time_to_first_token <= sum(result.timings[0].steps)
    banned = model.generate(prompts=PROMPTS, tokenizer=TOKENIZER, no_repeat_ngram_size=30)  # transformers' own loop
    assert banned.generated_texts == ANSWERS


def test_a_prompt_streams_and_several_are_refused(
    model: QEFFAutoModelForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = TextStreamer(TOKENIZER, skip_prompt=True, skip_special_tokens=True)
    model.generate(prompts=PROMPTS[0], tokenizer=TOKENIZER, streamer=streamer)
    assert ANSWERS[0] in capsys.readouterr().out
    with pytest.raises(RuntimeInputError, match="a streamer is told of one row, and there are 2"):
        model.generate(prompts=PROMPTS[:2], tokenizer=TOKENIZER, streamer=streamer)


def test_an_engine_has_the_slots_of_the_package(model: QEFFAutoModelForCausalLM, tmp_path: Path) -> None:
    stop = frozenset({int(TOKENIZER.eos_token_id)})
    rows = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
    with model.engine() as engine:
        assert engine.slots == 2
        tickets = [engine.submit(Job(row, 12, stop)) for row in rows]
        answers = [[e.token for e in ticket] for ticket in tickets]
        again = engine.submit(Job(rows[-1], 12, stop))
        assert [e.token for e in again] == answers[-1]
        assert again.cached == (len(rows[-1]) - 1) // 8 * 8 > 0
    assert [TOKENIZER.decode(a, skip_special_tokens=True) for a in answers] == ANSWERS
