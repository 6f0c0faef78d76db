"""What a request asks for: merged as transformers merges it, and every field and argument answered for."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import configuration_utils
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin

from qeff_ir.errors import RuntimeInputError
from qeff_ir.frontend.versions import CACHE
from qeff_ir.runtime import request
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.generation import SessionLM
from tests import support

CTX, PAD, EOS = 48, 0, 2
ROWS = support.prompts([13, 4], seed=2)
IDS = torch.tensor([[PAD] * (13 - len(row)) + row for row in ROWS])
MASK = torch.tensor([[0] * (13 - len(row)) + [1] * len(row) for row in ROWS])


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return support.plain_decoder("llama", "onnxruntime", prefill_seq_len=8, ctx_len=CTX, batch_size=2)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return copy.deepcopy(support.tiny("llama")[1])


def session(decoder: Decoder, reference: PreTrainedModel, **defaults: Any) -> SessionLM:
    """Both models with these defaults."""
    config = GenerationConfig(**{"pad_token_id": PAD, "eos_token_id": EOS, **defaults})
    reference.generation_config = config
    return SessionLM(decoder, reference.config, copy.deepcopy(config))


TABLE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"generation_config": GenerationConfig(max_new_tokens=6)}),
    ({}, {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=False), "repetition_penalty": 1.5}),
    ({}, {"generation_config": GenerationConfig(max_new_tokens=6), "max_new_tokens": 4}),
    ({"repetition_penalty": 1.7}, {"generation_config": GenerationConfig(max_new_tokens=9)}),
    ({"repetition_penalty": 1.7}, {"max_new_tokens": 9, "repetition_penalty": 1.0}),
    ({"pad_token_id": EOS}, {"max_new_tokens": 6}),
    ({"pad_token_id": EOS}, {"max_new_tokens": 6, "pad_token_id": PAD}),
    ({"pad_token_id": None}, {"max_new_tokens": 6}),
    ({"pad_token_id": None}, {"generation_config": GenerationConfig(max_new_tokens=6, pad_token_id=PAD)}),
    ({}, {"max_new_tokens": 6, "pad_token_id": None}),
    ({"eos_token_id": [2, 9, 17]}, {"generation_config": GenerationConfig(max_new_tokens=25)}),
    ({"eos_token_id": None}, {"max_new_tokens": 6}),
    ({}, {"max_new_tokens": 25, "eos_token_id": torch.tensor([9, 17])}),
    ({"max_length": 20}, {}),
    ({"max_length": 20}, {"generation_config": GenerationConfig()}),
    ({"max_length": 20}, {"max_new_tokens": 3}),
    ({"max_new_tokens": 4}, {}),
    ({"max_new_tokens": 4}, {"generation_config": GenerationConfig(max_length=30)}),
    ({}, {"max_length": 17}),
    ({}, {"generation_config": GenerationConfig(max_length=17)}),
    ({"min_new_tokens": 9}, {"generation_config": GenerationConfig(max_new_tokens=9)}),
    ({}, {"max_new_tokens": 9, "min_length": 20}),
    ({"do_sample": True, "top_k": 5, "temperature": 0.7}, {"max_new_tokens": 9}),
    ({"do_sample": True, "top_k": 5}, {"generation_config": GenerationConfig(max_new_tokens=9, temperature=1.3)}),
    ({"do_sample": True, "top_p": 0.5}, {"max_new_tokens": 9, "do_sample": False}),
    ({"num_beams": 3}, {"max_new_tokens": 5, "num_beams": 1}),
    ({"output_hidden_states": True}, {"max_new_tokens": 5}),
    ({"cache_implementation": "hybrid", "use_cache": False}, {"max_new_tokens": 5}),
    ({}, {"max_new_tokens": 5, "use_cache": False}),
    ({}, {"max_new_tokens": 5, "cache_implementation": "static", "disable_compile": True}),
    ({}, {"max_new_tokens": 5, "early_stopping": True, "length_penalty": 2.0, "low_memory": True}),
    ({"chat_format": "of the model's own"}, {"generation_config": GenerationConfig(max_new_tokens=5)}),
    ({}, {"max_new_tokens": 7, "encoder_repetition_penalty": 1.5, "exponential_decay_length_penalty": (2, 1.5)}),
    ({}, {"max_new_tokens": 7, "forced_bos_token_id": 11, "forced_eos_token_id": 12, "renormalize_logits": True}),
    ({}, {"max_new_tokens": 5, "logits_to_keep": 1, "trust_remote_code": False, "output_router_logits": False}),
    ({}, {k: v for k, v in GenerationConfig(max_new_tokens=5, top_k=7, do_sample=True).to_dict().items() if v}),
]


@pytest.mark.parametrize(("defaults", "arguments"), TABLE, ids=lambda v: str(v)[:70].replace("\n", ""))
def test_settings_count_as_in_transformers(
    defaults: dict[str, Any], arguments: dict[str, Any], decoder: Decoder, reference: PreTrainedModel
) -> None:
    """Padding is in the ids and no mask is given, so that the pad token of the merged settings is needed, too."""
    model = session(decoder, reference, **defaults)
    torch.manual_seed(3)
    expected = support.generate(reference, input_ids=IDS, **copy.deepcopy(arguments))
    torch.manual_seed(3)
    found = model.generate(IDS, **arguments)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == expected.tolist()


def test_padding_matters_to_the_table(decoder: Decoder, reference: PreTrainedModel) -> None:
    """The kill test of the above: read as text, the padding gives other tokens."""
    model = session(decoder, reference)
    padded, text = (model.generate(IDS, max_new_tokens=6, pad_token_id=pad)[1].tolist() for pad in (PAD, 90))
    assert padded[13:] != text[13:]


def test_a_plain_call_says_nothing(
    decoder: Decoder, reference: PreTrainedModel, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """No deprecation and no advice about settings that the caller has not made."""
    model = session(decoder, reference, max_length=4096, min_length=1)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model.generate(IDS, attention_mask=MASK)
        model.generate(IDS, attention_mask=MASK, max_new_tokens=4)
        model.generate(IDS, attention_mask=MASK, generation_config=GenerationConfig(max_new_tokens=4, min_new_tokens=2))
        model.generate(IDS, attention_mask=MASK, return_dict_in_generate=True, use_cache=False)
    assert [r.getMessage() for r in caplog.records] == []
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize(
    "defaults", [{"max_length": 4096}, {"max_new_tokens": 512}, {"max_new_tokens": 512, "max_length": 99}]
)
def test_a_length_of_the_model_is_cut_to_the_room(
    defaults: dict[str, Any], decoder: Decoder, reference: PreTrainedModel
) -> None:
    model = session(decoder, reference, **defaults, eos_token_id=None)
    found = model.generate(IDS)
    assert found.shape[1] == CTX + 1  # the last token is only read out
    expected = support.generate(reference, input_ids=IDS, max_new_tokens=CTX + 1 - 13)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "wish",
    [
        {"max_new_tokens": 37},
        {"max_length": 50},
        {"generation_config": GenerationConfig(max_new_tokens=37)},
        {"generation_config": GenerationConfig(max_length=50)},
        {"min_new_tokens": 37},
        {"min_length": 50},
    ],
    ids=str,
)
def test_a_length_of_the_caller_is_not_cut(wish: dict[str, Any], decoder: Decoder, reference: PreTrainedModel) -> None:
    model = session(decoder, reference, eos_token_id=None)
    with pytest.raises(RuntimeInputError, match="37 new ones do not fit the compiled context of 48: compile with"):
        model.generate(IDS, **wish)


@pytest.mark.parametrize("wish", [{"min_length": CTX + 1}, {"min_new_tokens": CTX + 1 - 13}], ids=str)
def test_a_least_length_that_just_fits_is_taken(
    wish: dict[str, Any], decoder: Decoder, reference: PreTrainedModel
) -> None:
    """The least length counts the prompt, the least number of new tokens does not."""
    model = session(decoder, reference, max_length=4096)
    found = model.generate(IDS, **wish)
    assert found.shape[1] == CTX + 1
    expected = support.generate(reference, input_ids=IDS, max_new_tokens=CTX + 1 - 13, **wish)
    assert found.tolist() == expected.tolist()


def test_a_length_that_the_prompt_has_already_is_refused(decoder: Decoder, reference: PreTrainedModel) -> None:
    with pytest.raises(RuntimeInputError, match="max_length=13 leaves no new token after a prompt of 13"):
        session(decoder, reference, max_length=13).generate(IDS)


def test_the_library_stops_where_the_positions_end(reference: PreTrainedModel, decoder: Decoder) -> None:
    """Without any length, transformers gives 20 tokens, or as many as the model has positions for."""
    model = session(decoder, reference, eos_token_id=None)
    ids = torch.tensor(support.prompts([40, 40], seed=5))
    for positions, new in ((CTX, 8), (44, 4), (4096, 9)):
        reference.config.max_position_embeddings, before = positions, reference.config.max_position_embeddings
        try:
            assert model.generate(ids).shape[1] == 40 + new
        finally:
            reference.config.max_position_embeddings = before


def test_every_field_is_answered_for() -> None:
    """Fails when the installed transformers has a field that nobody has thought about."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    lists = (request.HONORED, request.HARMLESS, frozenset(request.REFUSED))
    assert fields == frozenset().union(*lists)
    assert sum(map(len, lists)) == len(fields)  # each is in one list


def test_every_argument_is_answered_for() -> None:
    mixin: Any = GenerationMixin  # its methods are typed for models that generate, not for itself
    named = set(inspect.signature(mixin.generate).parameters) - {"self", "inputs", "kwargs"}
    assert named <= request.CALLBACKS | request.HARMLESS_ARGUMENTS | set(request.REFUSED_ARGUMENTS)


def test_every_cache_of_transformers_is_answered_for() -> None:
    known = {name for name in configuration_utils.ALL_CACHE_IMPLEMENTATIONS if name != "quantized"}
    assert known <= set(request.REFUSED["cache_implementation"][0])


def test_a_field_that_is_new_is_refused_when_it_is_set(
    decoder: Decoder, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "HONORED", request.HONORED - {"top_h"})
    model = session(decoder, reference)
    assert model.generate(IDS, max_new_tokens=2).shape[1] == 15
    with pytest.raises(RuntimeInputError, match="top_h is not known to this qeff-ir: leave it out"):
        model.generate(IDS, do_sample=True, top_h=0.5)


ASSISTANT: Any = object()
REFUSED_FIELDS: dict[str, Any] = {
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "constraints": ["any"],
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "output_attentions": True,
    "output_hidden_states": True,
    "token_healing": True,
    "use_mtp": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "is_assistant": True,
    "cache_implementation": "quantized",
}


@pytest.mark.parametrize("way", ["argument", "object", "model"])
@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_what_a_compiled_model_does_not_have_is_refused(
    name: str, way: str, decoder: Decoder, reference: PreTrainedModel
) -> None:
    """Whoever asks for it: the caller by name or in an object, or the model's own files."""
    field = {name: REFUSED_FIELDS[name]}
    shown = {"return_dict_in_generate": True}
    model = session(decoder, reference, **(field if way == "model" else {}))
    arguments = {
        "argument": {**field, **shown},
        "object": {"generation_config": GenerationConfig(**field, **shown)},
        "model": shown,
    }[way]
    with pytest.raises(RuntimeInputError, match=rf"^{name} ") as error:
        model.generate(IDS, **arguments)
    assert "\n" not in str(error.value) and "SessionLM" not in str(error.value)
    assert ("the model's own default: pass" in str(error.value)) == (way == "model")


def test_refused_fields_are_all_tried() -> None:
    assert set(REFUSED_FIELDS) == set(request.REFUSED)


@pytest.mark.parametrize("name", request.REFUSED_ARGUMENTS)
def test_arguments_that_a_compiled_model_does_not_take(name: str, decoder: Decoder, reference: PreTrainedModel) -> None:
    model = session(decoder, reference)
    for nothing in (None, False):
        assert model.generate(IDS, max_new_tokens=1, **{name: nothing}).shape[1] == 14
    for something in (torch.ones(2, 13, dtype=torch.long), True, "text"):
        with pytest.raises(RuntimeInputError, match=rf"^{name} "):
            model.generate(IDS, max_new_tokens=1, **{name: something})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"generation_config": {}}, "generation_config is a dict: give a GenerationConfig, or its fields"),
    ({"generation_config": "model"}, "generation_config is a str"),
    ({"max_new_tokens": "2"}, "max_new_tokens is '2': give a whole number of at least 1"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: give a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens is True: give a whole number"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_length": -1}, "max_length is -1"),
    ({"min_new_tokens": -1}, "min_new_tokens is -1: give a whole number of at least 0"),
    ({"num_return_sequences": "1"}, "num_return_sequences is '1'"),
    ({"num_beams": [2]}, "num_beams is [2]: give a whole number"),
    ({"max_new_token": 5}, "does not take max_new_token: did you mean max_new_tokens?"),
    ({"labels": IDS}, "does not take labels: leave it out"),
    ({"pixel_values": torch.ones(1)}, "does not take pixel_values"),
    ({"cache_position": torch.ones(1)}, "does not take cache_position"),
    ({"streamer": 5}, "streamer is a int: give a streamer"),
    ({"tokenizer": "model"}, "tokenizer is a str: give a tokenizer"),
    ({"logits_processor": LogitsProcessor()}, "logits_processor is a LogitsProcessor: give a list"),
    ({"logits_processor": [5]}, "logits_processor is a list: give a list of functions"),
    ({"stopping_criteria": 5}, "stopping_criteria is a int: give a list"),
    ({"prefix_allowed_tokens_fn": [5]}, "prefix_allowed_tokens_fn is a list: give a function"),
    ({"temperature": "hot", "do_sample": True}, "transformers refuses the request: "),
    ({"top_k": 2.5, "do_sample": True}, "transformers refuses the request: "),
    ({"top_p": -1.0, "do_sample": True}, "transformers refuses the request: `top_p` has to be a float > 0 and < 1"),
    ({"repetition_penalty": -1.0}, "transformers refuses the request: "),
    ({"bad_words_ids": [5]}, "transformers refuses the request: "),
    ({"bad_words_ids": [[9999]]}, "transformers refuses the request: "),
    ({"eos_token_id": "stop"}, "transformers refuses the request: "),
    ({"stop_strings": "x"}, "transformers refuses the request: There are one or more stop strings"),
    ({"forced_eos_token_id": 9999, "max_new_tokens": 2}, "transformers refuses the request: "),
    ({"cache_implementation": "paged"}, "cache_implementation asks for another cache"),
    ({"cache_implementation": "none"}, "transformers refuses the request: Invalid `cache_implementation`"),
    ({"early_stopping": "late"}, "transformers refuses the request: `early_stopping` must be"),
    ({"do_sample": True, "watermarking_config": {"bias": "x"}}, "transformers refuses the request: "),
    ({"input_ids": IDS}, "inputs and input_ids are the same thing"),
    ({"attention_mask": MASK * 0.5}, "attention_mask has other numbers than 0 and 1"),
    ({"attention_mask": MASK * 2}, "attention_mask has other numbers than 0 and 1"),
    ({"attention_mask": torch.full(IDS.shape, float("nan"))}, "attention_mask has other numbers than 0 and 1"),
    ({"attention_mask": MASK.tolist()}, "attention_mask is a list: give a tensor"),
    ({"attention_mask": torch.ones(2, 1, 13, 13)}, "they need one shape"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[str(a)[:50].replace("\n", "") for a, _ in WRONG])
def test_a_wrong_call_is_refused_in_one_sentence(
    arguments: dict[str, Any], message: str, decoder: Decoder, reference: PreTrainedModel
) -> None:
    model = session(decoder, reference)
    with pytest.raises(RuntimeInputError) as error:
        model.generate(IDS, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and "SessionLM" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS.float(), "input_ids is float32: give whole numbers"),
        (IDS + 0.7, "input_ids is float32"),
        (IDS.half(), "input_ids is float16"),
        (IDS.bool(), "input_ids is bool"),
        (IDS.to(torch.complex64), "input_ids is complex64"),
        (IDS.to("meta"), "generate needs input_ids of shape [batch, tokens]"),
        (IDS.tolist(), "with at least one token, not a list"),
        ({"input_ids": IDS}, "with at least one token, not a dict"),
        (IDS[None], "generate needs input_ids of shape"),
    ],
    ids=lambda v: str(getattr(v, "dtype", ""))[:30],
)
def test_ids_are_whole_numbers_of_two_dimensions(
    ids: Any, message: str, decoder: Decoder, reference: PreTrainedModel
) -> None:
    with pytest.raises(RuntimeInputError) as error:
        session(decoder, reference).generate(ids, max_new_tokens=2)
    assert message in str(error.value)


def test_any_whole_numbers_and_any_mask_of_zeros_and_ones_will_do(decoder: Decoder, reference: PreTrainedModel) -> None:
    model = session(decoder, reference)
    expected = model.generate(IDS, max_new_tokens=4).tolist()
    for kind in (torch.int32, torch.uint8, torch.int16):
        assert model.generate(IDS.to(kind), max_new_tokens=4).tolist() == expected
    for mask in (MASK, MASK.bool(), MASK.float(), MASK.to(torch.int8)):
        assert model.generate(IDS, attention_mask=mask, max_new_tokens=4).tolist() == expected


class BrokenError(Exception):
    pass


class Callback(BaseStreamer, LogitsProcessor, StoppingCriteria):
    """Raises what it was made with."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self.error

    def put(self, value: Any) -> None:
        raise self.error

    def end(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [ValueError("mine"), TypeError("mine"), BrokenError("mine"), KeyError("mine")], ids=repr
)
@pytest.mark.parametrize("name", ["streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"])
def test_what_a_callback_raises_is_the_callers_own(
    name: str, error: Exception, decoder: Decoder, reference: PreTrainedModel
) -> None:
    model = session(decoder, reference)
    callback = Callback(error)
    given: Any = [callback] if name.endswith(("processor", "criteria")) else callback
    with pytest.raises(type(error)) as raised:
        model.generate(IDS, max_new_tokens=3, **{name: given})
    assert raised.value is error
    assert model.generate(IDS, max_new_tokens=1).shape[1] == 14


def test_a_fault_of_the_session_is_not_blamed_on_the_request(
    decoder: Decoder, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_inputs: Any) -> Any:
        raise ValueError("a defect")

    model = session(decoder, reference)
    monkeypatch.setattr(decoder.session, "run", broken)
    with pytest.raises(ValueError, match="a defect"):
        model.generate(IDS, max_new_tokens=3)


def test_a_fault_of_ours_is_not_blamed_on_the_request(
    decoder: Decoder, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = session(decoder, reference)
    monkeypatch.setattr(type(decoder), "prefill", None)
    with pytest.raises(TypeError, match="not callable"):
        model.generate(IDS, max_new_tokens=3)


@pytest.mark.parametrize("pad", [-1, 9999])
def test_rows_that_have_ended_may_be_filled_with_any_token(
    pad: int, decoder: Decoder, reference: PreTrainedModel
) -> None:
    """transformers looks it up and fails; it is never read, so the rows that go on are right."""
    model = session(decoder, reference)
    plain = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, eos_token_id=None)
    stop = int(plain[0, 14])
    assert stop not in plain[1, 13:].tolist()
    found = model.generate(IDS, attention_mask=MASK, max_new_tokens=8, eos_token_id=stop, pad_token_id=pad)
    assert found[0, 13:].tolist() == [*plain[0, 13 : 13 + plain[0, 13:].tolist().index(stop) + 1].tolist()] + [pad] * (
        7 - plain[0, 13:].tolist().index(stop)
    )
    assert found[1].tolist() == plain[1].tolist()


def test_the_cache_that_is_not_returned_is_refused_when_it_is_used(
    decoder: Decoder, reference: PreTrainedModel
) -> None:
    model = session(decoder, reference)
    out = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True)
    kept = out[CACHE]
    assert "kept by the session" in repr(out)
    for use in (lambda: kept.get_seq_length(), lambda: len(kept), lambda: kept[0], lambda: list(kept)):
        with pytest.raises(RuntimeInputError, match="the session keeps the cache: give generate the whole prompt"):
            use()
    with pytest.raises(RuntimeInputError, match=f"^{CACHE} is not taken"):
        model.generate(IDS, max_new_tokens=2, **{CACHE: kept})
    assert out.hidden_states is None and out.attentions is None
    assert pickle.loads(pickle.dumps(out))["sequences"].tolist() == out.sequences.tolist()
    assert copy.deepcopy(out)["sequences"].tolist() == out.sequences.tolist()


@pytest.mark.parametrize("name", ["return_dict_in_generate", "do_sample", "use_cache", "temperature"])
def test_a_tensor_in_place_of_a_setting_is_refused(name: str, decoder: Decoder, reference: PreTrainedModel) -> None:
    with pytest.raises(RuntimeInputError, match=f"^{name} is "):
        session(decoder, reference).generate(IDS, **{name: torch.ones(1, 2)})
