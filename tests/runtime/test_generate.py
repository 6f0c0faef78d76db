"""`generate` gives what transformers gives, token for token, and refuses what does not fit in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.errors import PackageError, RuntimeInputError
from tests import support

CTX = 48


def compiled(batch_size: int) -> QEFFAutoModelForCausalLM:
    model = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
    model.compile(target="onnxruntime", batch_size=batch_size, prefill_seq_len=8, ctx_len=CTX)
    return model


@pytest.fixture(scope="module")
def one() -> QEFFAutoModelForCausalLM:
    return compiled(1)


@pytest.fixture(scope="module")
def two() -> QEFFAutoModelForCausalLM:
    return compiled(2)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return support.tiny("llama")[1]


PROMPT = torch.tensor(support.prompts([11], seed=1))
ROWS = support.prompts([13, 4], seed=2)


def padded(side: str) -> dict[str, Any]:
    width = max(map(len, ROWS))
    ids, mask = [], []
    for row in ROWS:
        gap = [0] * (width - len(row))
        ids.append(gap + row if side == "left" else row + gap)
        mask.append(gap + [1] * len(row) if side == "left" else [1] * len(row) + gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


GREEDY: list[Any] = [
    {"max_new_tokens": 20},
    {"max_length": 30},
    {"max_new_tokens": 1},
    pytest.param(  # transformers' own default length
        {}, marks=pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
    ),
    {"max_new_tokens": 12, "repetition_penalty": 1.7},
    {"max_new_tokens": 12, "no_repeat_ngram_size": 1},
    {"max_new_tokens": 12, "min_new_tokens": 12},
    {"max_new_tokens": 12, "bad_words_ids": [[7]], "suppress_tokens": [9, 10]},
    {"generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=0, repetition_penalty=1.3)},
    {"generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=0), "max_new_tokens": 5},
]


@pytest.mark.parametrize("arguments", GREEDY, ids=str)
def test_greedy(arguments: dict[str, Any], one: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    expected = support.generate(reference, input_ids=PROMPT, **arguments)
    assert expected.shape[1] > PROMPT.shape[1]
    assert one.generate(PROMPT, **arguments).tolist() == expected.tolist()
    assert one.generate(input_ids=PROMPT, **arguments).tolist() == expected.tolist()


@pytest.mark.parametrize("pad", [2, 7])
def test_a_token_of_the_prompt_that_pads_elsewhere(
    pad: int, one: QEFFAutoModelForCausalLM, reference: PreTrainedModel
) -> None:
    """Without a mask, transformers takes it for padding, unless it is a stop token too."""
    prompt = torch.tensor([[pad, pad, 5, 9, 17]])
    expected = support.generate(reference, input_ids=prompt, max_new_tokens=6, pad_token_id=pad)
    assert one.generate(prompt, max_new_tokens=6, pad_token_id=pad).tolist() == expected.tolist()
    other = support.generate(reference, input_ids=prompt[:, 2:], max_new_tokens=6)
    assert (expected[0, 5:].tolist() == other[0, 3:].tolist()) == (pad != 2)


def test_processors_change_the_answer(reference: PreTrainedModel) -> None:
    """The kill test of the above: the arguments matter to this prompt."""
    plain = support.generate(reference, input_ids=PROMPT, max_new_tokens=12).tolist()
    for arguments in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}):
        assert support.generate(reference, input_ids=PROMPT, max_new_tokens=12, **arguments).tolist() != plain


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7, "top_k": 0},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    {"min_p": 0.02},
]


@pytest.mark.parametrize("arguments", SAMPLING, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_sampling_with_one_seed(
    seed: int, arguments: dict[str, Any], two: QEFFAutoModelForCausalLM, reference: PreTrainedModel
) -> None:
    batch = padded("left")
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": 15, **arguments}
    torch.manual_seed(seed)
    expected = support.generate(reference, **batch, **common)
    torch.manual_seed(seed)
    assert two.generate(**batch, **common).tolist() == expected.tolist()
    assert expected.tolist() != support.generate(reference, **batch, max_new_tokens=15).tolist()


def test_left_padded_batches(two: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    batch = padded("left")
    expected = support.generate(reference, **batch, max_new_tokens=20)
    assert two.generate(**batch, max_new_tokens=20).tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_no_part_of_the_prompt(
    side: str, two: QEFFAutoModelForCausalLM, reference: PreTrainedModel
) -> None:
    """transformers itself answers right-padded rows wrongly, so each row is asked alone."""
    batch = padded(side)
    width = batch["input_ids"].shape[1]
    out = two.generate(**batch, max_new_tokens=20)
    assert out[:, :width].tolist() == batch["input_ids"].tolist()
    for row, prompt in enumerate(ROWS):
        alone = support.generate(reference, input_ids=torch.tensor([prompt]), max_new_tokens=20, eos_token_id=None)
        assert out[row, width:].tolist() == alone[0, len(prompt) :].tolist()


def test_the_pad_token_tells_the_mask_when_none_is_given(two: QEFFAutoModelForCausalLM) -> None:
    batch = padded("left")
    assert (
        two.generate(batch["input_ids"], max_new_tokens=9).tolist() == two.generate(**batch, max_new_tokens=9).tolist()
    )


def test_a_pad_token_that_also_stops_is_part_of_a_prompt(two: QEFFAutoModelForCausalLM) -> None:
    """As in transformers, also where the request says what stops."""
    ids = padded("left")["input_ids"]
    pad = int(ids[ids != two.runner().generation_config.pad_token_id][3])
    given: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": pad, "eos_token_id": [pad]}
    whole = two.generate(ids, attention_mask=torch.ones_like(ids), **given)
    assert two.generate(ids, **given).tolist() == whole.tolist()
    given["eos_token_id"] = None
    assert two.generate(ids, **given).tolist() != whole.tolist()


def test_stop_tokens(two: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    batch = padded("left")
    width = batch["input_ids"].shape[1]
    plain = support.generate(reference, **batch, max_new_tokens=20)[:, width:].tolist()
    stops = [plain[0][3], plain[1][6]]
    expected = support.generate(reference, **batch, max_new_tokens=20, eos_token_id=stops)
    assert expected.shape[1] < width + 20  # it did stop
    assert two.generate(**batch, max_new_tokens=20, eos_token_id=stops).tolist() == expected.tolist()


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_told_of_every_token(one: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    expected, got = Collector(), Collector()
    support.generate(reference, input_ids=PROMPT, max_new_tokens=7, streamer=expected)
    one.generate(PROMPT, max_new_tokens=7, streamer=got)
    assert got.pieces == expected.pieces
    assert got.ended


def test_scores_and_sequences_as_a_dictionary(one: QEFFAutoModelForCausalLM, reference: Any) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        expected = reference.generate(PROMPT, **arguments)
    got = one.generate(PROMPT, **arguments)
    assert got["sequences"].tolist() == expected["sequences"].tolist()
    torch.testing.assert_close(torch.stack(got["logits"]), torch.stack(expected["logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("configured", [False, True])
def test_several_answers_to_one_prompt(
    configured: bool, two: QEFFAutoModelForCausalLM, reference: PreTrainedModel
) -> None:
    common: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 12}
    if configured:
        common = {"generation_config": GenerationConfig(**common, pad_token_id=0)}
    torch.manual_seed(4)
    expected = support.generate(reference, input_ids=PROMPT, **common)
    torch.manual_seed(4)
    assert two.generate(PROMPT, **common).tolist() == expected.tolist()
    assert expected[0].tolist() != expected[1].tolist()


def test_several_answers_to_each_of_several_prompts(reference: PreTrainedModel) -> None:
    """Every answer stands behind its own prompt, padding where it was."""
    batch = padded("right")
    common: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6}
    torch.manual_seed(4)
    expected = support.generate(reference, **padded("left"), **common)
    torch.manual_seed(4)
    found, width = compiled(4).generate(**batch, **common), batch["input_ids"].shape[1]
    assert found[:, width:].tolist() == expected[:, width:].tolist()
    first, second = batch["input_ids"].tolist()
    assert found[:, :width].tolist() == [first, first, second, second]


def test_a_package_generates_without_the_model(one: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    opened = QEFFAutoModelForCausalLM.from_package(one.package.folder)
    expected = support.generate(reference, input_ids=PROMPT, max_new_tokens=9)
    assert opened.generate(PROMPT, max_new_tokens=9).tolist() == expected.tolist()
    with pytest.raises(PackageError, match="cannot be compiled again"):
        opened.compile()


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 47, 48])
def test_the_context_can_be_filled_to_the_last_token(
    prompt: int, one: QEFFAutoModelForCausalLM, reference: PreTrainedModel
) -> None:
    """The last token is only read out, so it needs no room of its own."""
    ids = torch.tensor(support.prompts([prompt], seed=6))
    new = CTX - prompt + 1
    expected = support.generate(reference, input_ids=ids, max_new_tokens=new, eos_token_id=None)
    assert one.generate(ids, max_new_tokens=new, eos_token_id=None).tolist() == expected.tolist()
    with pytest.raises(RuntimeInputError, match=f"compile with ctx_len={CTX + 2} or more"):
        one.generate(ids, max_new_tokens=new + 1)


def test_without_a_length_generation_ends_with_the_context(one: QEFFAutoModelForCausalLM) -> None:
    ids = torch.tensor(support.prompts([CTX - 5], seed=6))
    assert one.generate(ids, eos_token_id=None).shape[1] <= CTX + 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"inputs": PROMPT, "max_new_tokens": 39}, "do not fit the compiled context of 48: compile with ctx_len=50"),
    ({"inputs": PROMPT, "max_length": 50}, "do not fit the compiled context of 48"),
    ({"inputs": PROMPT, "generation_config": GenerationConfig(max_new_tokens=60)}, "do not fit the compiled context"),
    ({"inputs": torch.full((1, 49), 5)}, "a prompt of 49 tokens"),
    ({"inputs": torch.full((3, 4), 5)}, "compiled for a batch of 1, but got 3 rows: compile with batch_size=3"),
    ({"inputs": PROMPT, "num_return_sequences": 2}, "but got 2 rows"),
    ({"inputs": PROMPT, "num_beams": 2}, "num_beams > 1 needs a cache that can be rewound"),
    ({"inputs": torch.empty((1, 0), dtype=torch.long)}, "at least one token"),
    ({"inputs": torch.tensor([5, 6])}, "needs input_ids of shape"),
    ({}, "needs input_ids of shape"),
    ({"inputs": PROMPT.tolist()}, "needs input_ids of shape [batch"),
    ({"inputs": PROMPT, "attention_mask": torch.ones(1, 3)}, "they need one shape"),
    ({"inputs": PROMPT, "attention_mask": torch.zeros_like(PROMPT)}, "is all padding"),
    ({"inputs": torch.tensor([[4, 97]])}, "outside the vocabulary of 97"),
    ({"inputs": torch.tensor([[4, -1]])}, "a token outside the vocabulary"),
    ({"inputs": PROMPT, "guidance_scale": 1.5}, "guidance_scale needs a second cache"),
    (
        {"inputs": PROMPT, "generation_config": GenerationConfig(guidance_scale=1.5)},
        "guidance_scale needs a second cache: leave it out",
    ),
    ({"prompts": ["a"]}, "prompts need tokenizer="),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str, one: QEFFAutoModelForCausalLM) -> None:
    with pytest.raises(RuntimeInputError) as error:
        one.generate(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refusal_does_no_harm(one: QEFFAutoModelForCausalLM, reference: PreTrainedModel) -> None:
    with pytest.raises(RuntimeInputError):
        one.generate(PROMPT, max_new_tokens=1000)
    expected = support.generate(reference, input_ids=PROMPT, max_new_tokens=5)
    assert one.generate(PROMPT, max_new_tokens=5).tolist() == expected.tolist()


def test_a_model_that_is_not_compiled_is_told(tmp_path: Path) -> None:
    model = QEFFAutoModelForCausalLM(support.tiny("llama")[1])
    with pytest.raises(PackageError, match="not compiled yet: call compile"):
        model.generate(PROMPT)


@pytest.mark.parametrize("extra", [{"input_ids": torch.ones((2, 3), dtype=torch.long)}, {"num_return_sequences": 2}])
def test_prompts_are_not_combined_with_token_ids(two: QEFFAutoModelForCausalLM, extra: dict[str, Any]) -> None:
    from qeff_ir.demo import MODEL_FOLDER

    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    with pytest.raises(RuntimeInputError, match=f"prompts cannot be combined with {next(iter(extra))}: give token ids"):
        two.generate(prompts=["1+1="], tokenizer=tokenizer, **extra)


def test_a_model_that_is_compiled_again_answers_as_compiled_last(reference: PreTrainedModel) -> None:
    """Not from the session that the first package has open."""
    model = compiled(2)
    model.generate(torch.tensor(ROWS[:1] * 2), max_new_tokens=2)
    model.compile(target="onnxruntime", batch_size=1, prefill_seq_len=8, ctx_len=CTX)
    expected = support.generate(reference, input_ids=PROMPT, max_new_tokens=6)
    assert model.generate(PROMPT, max_new_tokens=6).tolist() == expected.tolist()
