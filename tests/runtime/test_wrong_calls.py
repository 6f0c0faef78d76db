"""Wrong calls of the Python API end in one sentence, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qeff_ir import (
    QEffAutoLoraModelForCausalLM,
    QEFFAutoModelForCausalLM,
    QEffAutoPeftModelForCausalLM,
)
from qeff_ir.demo import ADAPTERS_FOLDER, MODEL_FOLDER
from qeff_ir.errors import AdapterError, CompileError, ModelLoadError, PackageError, QeffError, RuntimeInputError
from tests import support

TOKENIZER: Any = AutoTokenizer.from_pretrained(MODEL_FOLDER)
LONG, NUL = "a" * 300, "a\0b"
NO_PATHS: list[Any] = [5, None, b"model", [MODEL_FOLDER], LONG, NUL, "", object(), "~nobody-at-all/x", Path("x" * 300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForCausalLM:
    made = QEFFAutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    made.compile(target="onnxruntime", compile_dir=tmp_path_factory.mktemp("wrong") / "out")
    return made


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> QEffAutoPeftModelForCausalLM:
    made = QEffAutoPeftModelForCausalLM.from_pretrained(ADAPTERS_FOLDER / "subtract", "subtract")
    made.compile(target="onnxruntime", batch_size=2, compile_dir=tmp_path_factory.mktemp("wrong") / "lora")
    return made


def one_sentence(call: Callable[[], Any], kind: type[QeffError], message: str = "") -> None:
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", NO_PATHS, ids=lambda v: repr(v)[:12])
def test_what_is_not_a_path(path: Any, model: QEFFAutoModelForCausalLM) -> None:
    one_sentence(lambda: QEFFAutoModelForCausalLM.from_pretrained(path), ModelLoadError, "the model is ")
    one_sentence(lambda: QEffAutoLoraModelForCausalLM.from_pretrained(path), ModelLoadError, "the model is ")
    one_sentence(lambda: QEFFAutoModelForCausalLM.from_package(path), PackageError, "the package is ")
    one_sentence(lambda: QEffAutoPeftModelForCausalLM.from_pretrained(path), AdapterError, "the adapter is ")
    if path is not None:
        one_sentence(
            lambda: QEFFAutoModelForCausalLM.from_package(model.package.folder, checkpoint=path),
            ModelLoadError,
            "the model is ",
        )
        one_sentence(lambda: model.compile(compile_dir=path), PackageError, "compile_dir is ")


def test_paths_of_any_kind_are_taken(model: QEFFAutoModelForCausalLM) -> None:
    class Named:
        def __fspath__(self) -> str:
            return str(model.package.folder)

        def __str__(self) -> str:
            return self.__fspath__()

    paths: list[Any] = [str(model.package.folder), model.package.folder, Named()]
    for path in paths:
        assert QEFFAutoModelForCausalLM.from_package(path).package.folder == model.package.folder


@pytest.mark.parametrize("value", [None, "m", 5, torch.nn.Linear(2, 2)], ids=repr)
@pytest.mark.parametrize("kind", [QEFFAutoModelForCausalLM, QEffAutoPeftModelForCausalLM])
def test_what_is_not_a_model(kind: type[QEFFAutoModelForCausalLM], value: Any) -> None:
    one_sentence(lambda: kind(value), ModelLoadError, f"{type(value).__name__} is not a transformers model")


COMPILE: list[tuple[dict[str, Any], str]] = [
    ({"pipeline": 5}, "pipeline is 5: give a text"),
    ({"watch": 5}, "watch is 5: give a function"),
    ({"target": 5}, "target is 5: give a text"),
    ({"target": None}, "target is None: give a text"),
    ({"token_embedding": "device"}, "token_embedding is 'device': give 'graph' or 'host'"),
    ({"emit_only": "no"}, "emit_only is 'no': give True or False"),
    ({"mxfp6_matmul": "no"}, "mxfp6_matmul must be True or False, not 'no'"),
    ({"weight_free": 1}, "weight_free must be True or False, not 1"),
    ({"force_flags": None}, "force_flags must be True or False"),
    ({"batch_size": "2"}, "batch_size must be a whole number"),
    ({"ctx_len": 2.0}, "ctx_len must be a whole number"),
    ({"ctx_len": None}, "ctx_len must be a whole number"),
    ({"prefill_seq_len": True}, "prefill_seq_len must be a whole number"),
    ({"ctx_len": 16, "prefill_seq_len": 32}, "ctx_len=16 is less than prefill_seq_len=32"),
    ({"aic_enable_depth_first": object()}, "the flag aic_enable_depth_first is "),
    ({"mos": {1, 2}, "force_flags": True}, "the flag mos is {1, 2}: give a text, a number, or a list"),
    ({"mos": float("nan")}, "the flag mos is nan"),
    ({"mos": torch.ones(2)}, "the flag mos is "),
]


@pytest.mark.parametrize(("arguments", "message"), COMPILE, ids=[m for _, m in COMPILE])
def test_wrong_arguments_of_compile(arguments: dict[str, Any], message: str, model: QEFFAutoModelForCausalLM) -> None:
    """Nothing is lowered for them: the message comes before the first step."""
    steps: list[str] = []
    given: dict[str, Any] = {"target": "onnxruntime", "watch": lambda step, _: steps.append(step), **arguments}
    one_sentence(lambda: model.compile(**given), CompileError, message)
    assert steps == []


def test_wrong_arguments_of_compile_with_adapters(adapted: QEffAutoPeftModelForCausalLM) -> None:
    for arguments, message in COMPILE[:6]:
        given: dict[str, Any] = {"target": "onnxruntime", **arguments}
        one_sentence(lambda given=given: adapted.compile(**given), CompileError, message)


def test_a_context_shorter_than_a_prefill_run_takes_a_shorter_run() -> None:
    made = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
    made.compile(target="onnxruntime", ctx_len=16)
    options = made.package.manifest.options
    assert (options["prefill_seq_len"], options["ctx_len"]) == (16, 16)
    ids = torch.tensor(support.prompts([12], seed=1))
    expected = support.generate(support.tiny("llama")[1], input_ids=ids, max_new_tokens=5)
    assert made.generate(ids, max_new_tokens=5).tolist() == expected.tolist()


def test_a_path_as_a_flag_is_kept_as_text() -> None:
    from backends.ai100.options import Ai100Options

    assert Ai100Options(flags={"mos_file": Path("/x/y.yaml")}).flags == {"mos_file": "/x/y.yaml"}


def one_text() -> Any:
    yield "1+1="


PROMPTS: list[tuple[Any, str]] = [
    (5, "prompts is a int: give a text, or a list of texts"),
    (b"1+1=", "prompts is a bytes"),
    ({"1+1=": 1}, "prompts is a dict"),
    ([5], "prompt 0 is a int: give a text"),
    (["1+1=", None], "prompt 1 is a NoneType"),
    ([b"1"], "prompt 0 is a bytes"),
    ("\ud800", "prompt 0 cannot be read as Unicode"),
    ([], "there is no prompt: give at least one"),
]


@pytest.mark.parametrize(("prompts", "message"), PROMPTS, ids=[m for _, m in PROMPTS])
def test_what_is_not_a_prompt(
    prompts: Any, message: str, model: QEFFAutoModelForCausalLM, adapted: QEffAutoPeftModelForCausalLM
) -> None:
    one_sentence(lambda: model.generate(prompts=prompts, tokenizer=TOKENIZER), RuntimeInputError, message)
    one_sentence(lambda: adapted.generate(prompts=prompts, tokenizer=TOKENIZER), RuntimeInputError, message)


def test_prompts_of_any_iterable(model: QEFFAutoModelForCausalLM, adapted: QEffAutoPeftModelForCausalLM) -> None:
    texts: list[Any] = [["1+1="], ("1+1=",), "1+1=", one_text()]
    for prompts in texts:
        assert model.generate(prompts=prompts, tokenizer=TOKENIZER).generated_texts == ["2"]
    adapted.disable_adapter()
    assert adapted.generate(prompts=one_text(), tokenizer=TOKENIZER).generated_texts == ["2"]
    adapted.set_adapter("subtract")


class Failing:
    def __call__(self, text: str) -> Any:
        raise KeyError("no such piece")

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


class Panicking(Failing):
    """As a tokenizer in Rust whose file says something impossible: what it raises is no `Exception`."""

    def __call__(self, text: str) -> Any:
        raise type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("no entry found for key")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "model"}, "tokenizer is a str: give a tokenizer"),
        ({"tokenizer": 5}, "tokenizer is a int"),
        ({"tokenizer": Failing()}, "the tokenizer fails on the prompt '1+1=': 'no such piece'"),
        ({"tokenizer": Panicking()}, "the tokenizer fails on the prompt '1+1=': no entry found for key"),
        ({"generation_config": {}}, "generation_config is a dict"),
        ({"max_new_tokens": "2"}, "max_new_tokens is '2'"),
        ({"output_scores": True}, "prompts cannot be combined with output_scores"),
        ({"output_hidden_states": True}, "output_hidden_states is not there"),
        ({"inputs": torch.ones(1, 3, dtype=torch.long)}, "prompts cannot be combined with inputs"),
        ({"num_return_sequences": 0}, "prompts cannot be combined with num_return_sequences|num_return_sequences is 0"),
        ({"max_new_tokens": 500}, "do not fit the compiled context of 128"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_wrong_settings_beside_prompts(
    arguments: dict[str, Any], message: str, model: QEFFAutoModelForCausalLM
) -> None:
    given: dict[str, Any] = {"prompts": "1+1=", "tokenizer": TOKENIZER, **arguments}
    with pytest.raises(RuntimeInputError) as error:
        model.generate(**given)
    assert any(part in str(error.value) for part in message.split("|"))


@pytest.mark.parametrize("names", [5, b"subtract", [5], [["subtract"]], ["subtract", "none"]])
def test_what_is_not_an_adapter(names: Any, adapted: QEffAutoPeftModelForCausalLM) -> None:
    one_sentence(lambda: adapted.use_adapters(names), QeffError)
    one_sentence(lambda: adapted.generate(prompts="1+1=", tokenizer=TOKENIZER, adapters=names), QeffError)
    one_sentence(lambda: adapted.merge_adapter(names), QeffError)


@pytest.mark.parametrize("slots", [[0, 99], [5, 0], [0], [0.5, 1.0], [[0, 1]]], ids=str)
def test_slots_that_are_not_there(slots: Any, adapted: QEffAutoPeftModelForCausalLM) -> None:
    """Below zero is the base model, as hosts have it of rows that idle."""
    import numpy as np

    decoder = adapted.runner().decoder
    before = decoder.lora_ids
    for given in (np.array(slots), slots):
        decoder.lora_ids = given
        try:
            one_sentence(lambda: decoder.prefill([[5], [6]]), RuntimeInputError, "give 2 numbers of at most 4")
        finally:
            decoder.lora_ids = before
    assert decoder.prefill([[5], [6]]).shape[0] == 2
    assert decoder.prefill([[5], [6]], np.array([4, -1])).shape[0] == 2  # the last slot, and none


def test_a_length_of_the_model_does_not_refuse_prompts(model: QEFFAutoModelForCausalLM) -> None:
    """Nobody has asked for it: the answer ends with its stop token, or with the context."""
    runner = model.runner()
    before = runner.generation_config.max_length, runner.generation_config.max_new_tokens
    try:
        for lengths in ({"max_length": 4096}, {"max_new_tokens": 512}):
            given: dict[str, Any] = {"max_length": None, "max_new_tokens": None, **lengths}
            runner.generation_config.update(**given)
            assert model.generate(prompts="2+3=", tokenizer=TOKENIZER).generated_texts == ["5"]
    finally:
        runner.generation_config.max_length, runner.generation_config.max_new_tokens = before
