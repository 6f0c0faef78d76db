"""`generate_batch` and `engine` of a compiled model, beside transformers' own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from qeff_ir import QEFFAutoModelForCausalLM, QEffAutoPeftModelForCausalLM
from qeff_ir.demo import ADAPTERS_FOLDER, MODEL_FOLDER, TASKS
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.jobs import Job
from tests import support

PROMPTS = support.prompts([9, 3, 14, 5, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForCausalLM:
    made = QEFFAutoModelForCausalLM(support.tiny("llama")[1])
    folder = tmp_path_factory.mktemp("batch")
    made.compile(target="onnxruntime", prefill_seq_len=4, ctx_len=32, batch_size=2, compile_dir=folder / "two")
    return made


def alone(prompt: list[int], **settings: Any) -> list[int]:
    found = support.generate(support.tiny("llama")[1], input_ids=torch.tensor([prompt]), do_sample=False, **settings)
    return found[0, len(prompt) :].tolist()


def test_more_rows_than_slots_are_answered_as_each_alone(model: QEFFAutoModelForCausalLM) -> None:
    found = model.generate_batch(PROMPTS, max_new_tokens=6, record_timestamps=True)
    assert list(found) == [f"req_{number}" for number in range(len(PROMPTS))]
    for prompt, output in zip(PROMPTS, found.values(), strict=True):
        assert isinstance(output, GenerationOutput)
        assert output.is_finished()
        assert output.prompt_ids == prompt
        assert output.generated_tokens == alone(prompt, max_new_tokens=6)
        assert output.timestamps is not None
        assert len(output.timestamps) == len(output.generated_tokens)
    assert model.generate_batch([]) == {}


def test_settings_are_transformers(model: QEFFAutoModelForCausalLM) -> None:
    prompt = PROMPTS[0]
    plain = alone(prompt, max_new_tokens=8)
    config = GenerationConfig(max_new_tokens=8, eos_token_id=plain[3], repetition_penalty=1.0)
    (output,) = model.generate_batch([prompt], config).values()
    assert output.generated_tokens == plain[: plain.index(plain[3]) + 1]
    penalized = alone(prompt, max_new_tokens=8, repetition_penalty=1.5)
    (output,) = model.generate_batch([prompt], max_new_tokens=8, repetition_penalty=1.5).values()
    assert output.generated_tokens == penalized != plain


def test_samples_repeat_with_torchs_seed_and_each_copy_is_another(model: QEFFAutoModelForCausalLM) -> None:
    def drawn(seed: int) -> dict[str, list[int]]:
        torch.manual_seed(seed)
        found = model.generate_batch(
            PROMPTS[:2], max_new_tokens=10, do_sample=True, temperature=2.0, num_return_sequences=2
        )
        return {name: output.generated_tokens for name, output in found.items()}

    first = drawn(1)
    assert list(first) == ["req_0__child#0", "req_0", "req_1__child#0", "req_1"]
    assert first == drawn(1) != drawn(2)
    assert first["req_0__child#0"] != first["req_0"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([[5]], {"min_new_tokens": 3}, "min_new_tokens is not taken where requests share runs"),
        ([[5]], {"no_repeat_ngram_size": 2}, "no_repeat_ngram_size is not taken"),
        ([[5]], {"logits_processor": [print]}, "logits_processor is not taken"),
        ([[5]], {"num_beams": 2}, "num_beams > 1"),
        ([[5], []], {}, "row 1 is empty"),
        ([[5] * 30], {"max_new_tokens": 9}, "do not fit the compiled context of 32"),
        ([[97]], {}, "outside the vocabulary of 97"),
        (5, {}, "inputs is a int: give a list of rows"),
        ([[5]], {"streamer": print}, "streamer is not taken by generate_batch"),
    ],
)
def test_what_is_not_for_shared_runs_is_refused(
    rows: Any, settings: dict[str, Any], message: str, model: QEFFAutoModelForCausalLM
) -> None:
    with pytest.raises(RuntimeInputError) as error:
        model.generate_batch(rows, **settings)
    assert message in str(error.value)


def test_an_engine_shares_the_session_with_generate(model: QEFFAutoModelForCausalLM) -> None:
    """Whatever was in the slots before another request is not used again."""
    prompt = PROMPTS[2]
    expected = alone(prompt, max_new_tokens=5)
    with model.engine() as engine:
        first = engine.submit(Job(prompt, 5))
        assert [e.token for e in first] == expected
        second = engine.submit(Job(prompt, 5))
        assert [e.token for e in second] == expected
        assert (first.cached, second.cached) == (0, 12)
        model.generate(torch.tensor([[7] * 14] * 2), max_new_tokens=2)
        third = engine.submit(Job(prompt, 5))
        assert [e.token for e in third] == expected
        assert third.cached == 0


@pytest.mark.parametrize(
    ("target", "rows"),
    [("onnxruntime", {"batch_size": 2}), ("onnxruntime", {"full_batch_size": 3}), ("ai100", {"full_batch_size": 3})],
    ids=["rows", "slots", "slots of the AI 100"],
)
def test_each_row_has_its_adapter(target: str, rows: dict[str, Any], tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    model = QEffAutoPeftModelForCausalLM.from_pretrained(ADAPTERS_FOLDER / "subtract", "subtract")
    model.load_adapter(ADAPTERS_FOLDER / "larger", "larger")
    model.compile(
        target=target, prefill_seq_len=4, ctx_len=32, compile_dir=tmp_path, emit_only=target == "ai100", **rows
    )
    names, pairs = [None, "subtract", "larger", "subtract"], [(47, 38), (55, 12), (9, 61), (55, 12)]
    prompts = [f"{a}+{b}=" for a, b in pairs]
    found = model.generate_batch([tokenizer(p)["input_ids"] for p in prompts], adapters=names, max_new_tokens=8)
    texts = [tokenizer.decode(o.generated_tokens, skip_special_tokens=True) for o in found.values()]
    right = [a + b if name is None else TASKS[name](a, b) for (a, b), name in zip(pairs, names, strict=True)]
    assert texts == [str(number) for number in right]
    answers = model.generate(prompts=prompts, adapters=names, tokenizer=tokenizer, max_new_tokens=8)
    assert answers.generated_texts == texts
