"""From prompts to texts, with the bundled model, whose answers can be checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from qeff_ir import QEffAutoPeftModelForCausalLM
from qeff_ir.demo import ADAPTERS_FOLDER, MODEL_FOLDER, TASKS, problems
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.decoder import Timings
from qeff_ir.runtime.texts import GenerationResult

CTX = 96
TOKENIZER: Any = AutoTokenizer.from_pretrained(MODEL_FOLDER)
PROMPTS, ANSWERS = (list(part) for part in zip(*problems()[:5], strict=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QEffAutoPeftModelForCausalLM:
    """Two rows, and an adapter for each of the tasks."""
    made = QEffAutoPeftModelForCausalLM.from_pretrained(ADAPTERS_FOLDER / "subtract", "subtract")
    made.load_adapter(ADAPTERS_FOLDER / "larger", "larger")
    made.compile(target="onnxruntime", batch_size=2, ctx_len=CTX, compile_dir=tmp_path_factory.mktemp("texts") / "two")
    made.disable_adapter()
    return made


def test_any_number_of_prompts_is_answered_in_order(model: QEffAutoPeftModelForCausalLM) -> None:
    result = model.generate(prompts=PROMPTS, tokenizer=TOKENIZER)
    assert result.generated_texts == ANSWERS
    assert len(result.timings) == 3  # two, two, and one with a copy of itself
    assert result.time_to_first_token > 0.0
    assert result.tokens_per_second > 0.0
    assert "5 prompts" in str(result)


def test_times_are_of_batches_and_rates_of_all_rows() -> None:
    timings = [Timings(0.5, [0.25, 0.25], 6), Timings(0.25, [0.5], 1), Timings(0.75)]
    result = GenerationResult(["a"] * 7, [[1]] * 7, timings)
    assert result.time_to_first_token == 0.5  # three batches of seven prompts
    assert result.tokens_per_second == 7.0
    assert [t.decode_rate for t in timings] == [12.0, 2.0, 0.0]
    assert str(result) == "7 prompts, time to first token 500.0 ms, 7.0 tokens/s"
    assert GenerationResult(["a"], [[1]], timings[2:]).tokens_per_second == 0.0


def test_every_prompt_has_its_adapter_in_whichever_batch_it_runs(model: QEffAutoPeftModelForCausalLM) -> None:
    names = [None, "subtract", "larger", None, "subtract"]
    pairs = [(47, 38), (55, 12), (9, 61), (12, 34), (70, 7)]
    found = model.generate(prompts=[f"{a}+{b}=" for a, b in pairs], tokenizer=TOKENIZER, adapters=names)
    right = [a + b if name is None else TASKS[name](a, b) for (a, b), name in zip(pairs, names, strict=True)]
    assert found.generated_texts == [str(number) for number in right]


def test_an_answer_ends_with_its_stop_token(model: QEffAutoPeftModelForCausalLM) -> None:
    stop = model.runner().generation_config.eos_token_id
    ids = model.generate(prompts=PROMPTS[:2], tokenizer=TOKENIZER).generated_ids
    assert [len(row) for row in ids] == [3, 3]  # the longer answer does not fill up the shorter one
    shorter, longer = model.generate(prompts=["1+1=", "99+99="], tokenizer=TOKENIZER).generated_ids
    assert (len(shorter), len(longer)) == (2, 4)
    assert all(row[-1] == stop and stop not in row[:-1] for row in (*ids, shorter, longer))


def test_a_generation_config_is_heard(model: QEffAutoPeftModelForCausalLM) -> None:
    """Its length and its stop token are the request's, not the model's."""
    short = GenerationConfig(max_new_tokens=1, eos_token_id=model.runner().generation_config.eos_token_id)
    found = model.generate(prompts=PROMPTS[:2], tokenizer=TOKENIZER, generation_config=short)
    assert found.generated_texts == [answer[0] for answer in ANSWERS[:2]]
    first = found.generated_ids[0][0]
    stopped = GenerationConfig(eos_token_id=first)
    found = model.generate(prompts=PROMPTS[:1] * 2, tokenizer=TOKENIZER, generation_config=stopped)
    assert found.generated_ids == [[first]] * 2


class StopFirst(StoppingCriteria):
    """The first row ends with its first new token."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([True, False])


def test_an_answer_that_ends_otherwise_is_not_filled_up(model: QEffAutoPeftModelForCausalLM) -> None:
    pad = TOKENIZER("=")["input_ids"][-1]  # never in an answer
    first, second = model.generate(
        prompts=PROMPTS[:2],
        tokenizer=TOKENIZER,
        stopping_criteria=StoppingCriteriaList([StopFirst()]),
        pad_token_id=pad,
    ).generated_ids
    assert TOKENIZER.decode(first) == ANSWERS[0][0]
    assert TOKENIZER.decode(second, skip_special_tokens=True) == ANSWERS[1]


def test_without_a_stop_token_an_answer_ends_with_the_context(model: QEffAutoPeftModelForCausalLM) -> None:
    question = TOKENIZER("=")["input_ids"][-1]  # never ends an answer
    result = model.generate(prompts=PROMPTS[:2], tokenizer=TOKENIZER, eos_token_id=question)
    longest = max(len(TOKENIZER(prompt)["input_ids"]) for prompt in PROMPTS[:2])
    assert max(len(ids) for ids in result.generated_ids) == CTX - longest


@pytest.mark.parametrize("more", [{"return_dict_in_generate": True}, {"max_new_tokens": 8}])
def test_other_arguments_of_generate_change_no_text(model: QEffAutoPeftModelForCausalLM, more: dict[str, Any]) -> None:
    assert model.generate(prompts=PROMPTS[:3], tokenizer=TOKENIZER, **more).generated_texts == ANSWERS[:3]


def test_the_length_is_kept(model: QEffAutoPeftModelForCausalLM) -> None:
    result = model.generate(prompts=PROMPTS[:3], tokenizer=TOKENIZER, max_new_tokens=1)
    assert result.generated_texts == [answer[0] for answer in ANSWERS[:3]]


def test_nothing_to_answer_is_refused(model: QEffAutoPeftModelForCausalLM) -> None:
    with pytest.raises(RuntimeInputError, match="there is no prompt: give at least one"):
        model.generate(prompts=[], tokenizer=TOKENIZER)
