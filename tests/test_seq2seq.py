"""`QEFFAutoModelForSeq2SeqLM` and `QEFFAutoModelForSpeechSeq2Seq`: transformers' tokens and logits, on both targets."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor

from qeff_ir import QEFFAutoModelForCausalLM, QEFFAutoModelForSeq2SeqLM, QEFFAutoModelForSpeechSeq2Seq
from qeff_ir.errors import CompileError, ModelLoadError, PackageError, RuntimeInputError, UnsupportedModelError
from qeff_ir.numerics import error_over_rms
from qeff_ir.package import ENCODER, open_package
from tests import seq2seq
from tests.seq2seq import LENGTH, MODELS

NEW = 8
LOOSE = 1e-3
"""Bound of the error of logits: above that of single precision, far below what a value that is not seen makes."""
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
DEVICE = ("t5", "whisper", "moonshine")
"""Those that are compiled for the AI 100 too: a text, a recording, and one whose mask follows from that of samples."""
TARGETS = ["onnxruntime", "ai100"]
CASES = [(name, target) for name in MODELS for target in TARGETS if target == "onnxruntime" or name in DEVICE]


def opened(name: str) -> QEFFAutoModelForSeq2SeqLM:
    model = seq2seq.tiny(name)
    if MODELS[name].features:
        return QEFFAutoModelForSpeechSeq2Seq(model, seq2seq.Extractor(name))
    return QEFFAutoModelForSeq2SeqLM(model)


@functools.cache
def compiled(name: str, target: str, folder: Path) -> QEFFAutoModelForSeq2SeqLM:
    """The tiny model for two rows; do not compile it again."""
    model = opened(name)
    out = folder / f"{name}-{target}"
    path = model.compile(
        ctx_len=32, encoder_ctx_len=MODELS[name].positions, batch_size=2, target=target, compile_dir=out, emit_only=True
    )
    assert path == str(out)
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seq2seq")


def theirs(name: str) -> Any:
    """The tiny model of transformers."""
    return seq2seq.tiny(name)


def same(model: QEFFAutoModelForSeq2SeqLM, name: str, given: dict[str, Any], **more: Any) -> torch.Tensor:
    """Tokens of a compiled model, once they and all logits are those of transformers."""
    right = theirs(name).generate(**given, **{**GREEDY, **more})
    found = model.generate(**given, **{**GREEDY, **more})
    assert found.sequences.tolist() == right.sequences.tolist()
    for one, other in zip(found.logits, right.logits, strict=True):
        assert error_over_rms(one.numpy(), other.numpy()) <= LOOSE
    return found.sequences


def filled(value: torch.Tensor, name: str, length: int) -> torch.Tensor:
    """Features or their mask with zeros behind them."""
    behind = 0 if value.dim() == 2 else value.dim() - 2 - MODELS[name].length
    return torch.nn.functional.pad(value, [0, 0] * behind + [0, length - value.shape[value.dim() - 1 - behind]])


@pytest.mark.parametrize(("name", "target"), CASES)
def test_tokens_and_logits_are_those_of_transformers(name: str, target: str, folder: Path) -> None:
    model = compiled(name, target, folder)
    first = same(model, name, seq2seq.read(name))
    other = same(model, name, seq2seq.read(name, seed=2))  # nothing of what was read before is left
    assert first.tolist() != other.tolist()
    if MODELS[name].masked:  # a shorter one than compiled
        whole = MODELS[name].features[MODELS[name].length] if MODELS[name].features else LENGTH
        given = seq2seq.read(name, seed=3, length=whole * 2 // 3)
        if MODELS[name].features:  # of which encoders make something else when they are padded: that is to be asked for
            with pytest.raises(RuntimeInputError, match=rf"and the encoder takes just {whole}: let the processor pad"):
                model.generate(**given, **GREEDY)
            same(model, name, {n: filled(value, name, whole) for n, value in given.items()})
        else:
            same(model, name, given)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_one_prompt_and_prompts_of_the_decoder(target: str, folder: Path) -> None:
    model = compiled("t5", target, folder)
    given = seq2seq.read("t5")
    start = torch.tensor([[0, 11, 12], [0, 13, 14]])
    same(model, "t5", {**given, "decoder_input_ids": start})
    seen = torch.tensor([[1, 1, 1], [0, 1, 1]])
    same(model, "t5", {**given, "decoder_input_ids": start, "decoder_attention_mask": seen})
    for mask, said in ((seen.flip(1), "leaves out tokens behind others"), (seen[:, :2], "have two shapes")):
        with pytest.raises(RuntimeInputError, match=f"decoder_attention_mask .*{said}"):
            model.generate(**given, decoder_input_ids=start, decoder_attention_mask=mask)
    one = {name: value[:1] for name, value in given.items()}
    torch.manual_seed(0)
    found = model.generate(**one, num_return_sequences=2, do_sample=True, max_new_tokens=4, min_new_tokens=4)
    torch.manual_seed(0)
    right = theirs("t5").generate(**one, num_return_sequences=2, do_sample=True, max_new_tokens=4, min_new_tokens=4)
    assert found.tolist() == right.tolist()


def whisper_of_languages() -> Any:
    """Tiny, with the tokens that transformers' own class puts before an answer."""
    whisper: Any = copy.deepcopy(seq2seq.tiny("whisper"))
    config = whisper.generation_config
    config.lang_to_id, config.task_to_id = {"<|en|>": 20, "<|de|>": 21}, {"transcribe": 22, "translate": 23}
    config.is_multilingual, config.no_timestamps_token_id, config._from_model_config = True, 60, False
    config.prev_sot_token_id = 58
    return whisper


def test_a_recording_of_whisper_in_a_language_and_for_a_task(tmp_path: Path) -> None:
    """transformers' own class adds tokens for both, and what it suppresses."""
    whisper = whisper_of_languages()
    model = QEFFAutoModelForSpeechSeq2Seq(whisper, seq2seq.Extractor("whisper"))
    model.compile(ctx_len=32, batch_size=2, compile_dir=tmp_path / "out", target="onnxruntime", prefill_seq_len=4)
    given = seq2seq.read("whisper")
    settings: dict[str, Any] = {}
    for asked in ({"language": "de", "task": "translate"}, {"language": "en"}, {}):  # the last: it is to be told
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **asked}
        found, right = model.generate(**given, **settings), whisper.generate(**given, **settings)
        assert found.tolist() == right.tolist()
    again = QEFFAutoModelForSpeechSeq2Seq.from_package(tmp_path / "out")  # a package knows all of that
    assert again.generate(**given, **settings).tolist() == right.tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_passes_beside_the_loop_leave_the_request_as_it_is(target: str, tmp_path: Path) -> None:
    """Whether anybody speaks is asked of the model itself, between two tokens of an answer."""
    whisper = whisper_of_languages()
    model = QEFFAutoModelForSpeechSeq2Seq(whisper, seq2seq.Extractor("whisper"))
    model.compile(ctx_len=48, batch_size=2, compile_dir=tmp_path / "out", target=target, emit_only=True)
    given = seq2seq.read("whisper")
    asked: dict[str, Any] = {
        "max_new_tokens": NEW,
        "temperature": (0.0, 0.2),
        "logprob_threshold": -100.0,
        "language": "en",
    }
    asked |= {"return_timestamps": True, "do_sample": False}
    prompted: dict[str, Any] = {"no_speech_threshold": 0.6, "prompt_ids": torch.tensor([58, 30])}
    unheard: dict[str, Any] = {"no_speech_threshold": 0.6}
    for more in ({}, unheard, prompted):
        found, right = (one.generate(**given, **asked, **more) for one in (model, whisper))
        assert found.tolist() == right.tolist() and len(set(found[0].tolist())) > 1
    decoder = model.runner().decoder
    features = {"input_features": given["input_features"].numpy()}
    rows = [[2, 20, 22], [2, 31]]
    logits = decoder.beside(rows, features)
    hf = whisper(input_features=given["input_features"], decoder_input_ids=torch.tensor([[2, 20, 22], [2, 31, 0]]))
    for row, tokens in enumerate(rows):
        right = hf.logits[row, : len(tokens)].detach().numpy()
        assert error_over_rms(logits[row, : len(tokens)], right) <= LOOSE


def test_a_batch_with_fewer_rows_than_compiled(folder: Path, tmp_path: Path) -> None:
    """Of a long recording, fewer are left when the others have ended; of answers that are tried again, too."""
    one = {name: value[1:] for name, value in seq2seq.read("t5").items()}
    for target in TARGETS:
        same(compiled("t5", target, folder), "t5", one)
    whisper = whisper_of_languages()
    model = QEFFAutoModelForSpeechSeq2Seq(whisper, seq2seq.Extractor("whisper"))
    model.compile(ctx_len=32, batch_size=3, compile_dir=tmp_path / "out", target="onnxruntime")
    long = torch.cat([seq2seq.read("whisper", seed)["input_features"] for seed in (1, 2, 3)], dim=-1)
    mask = torch.ones((2, long.shape[-1]), dtype=torch.long)
    mask[1, 100:] = 0
    asked: dict[str, Any] = {"max_new_tokens": NEW, "return_timestamps": True, "language": "en"}
    for more in (
        {"do_sample": False},
        {"no_speech_threshold": 0.6, "temperature": (0.0, 0.2), "logprob_threshold": -0.5},
    ):
        settings: dict[str, Any] = {"input_features": long, "attention_mask": mask, **asked, **more}
        answers = list[torch.Tensor]()
        for each in (model, whisper):
            torch.manual_seed(0)
            answers.append(each.generate(**settings))
        assert answers[0].tolist() == answers[1].tolist()
    decoder = model.runner().decoder
    decoder.given = {"input_features": long[:, :, :60].numpy()}
    with pytest.raises(RuntimeInputError, match="input_features has 2 rows, and the decoder is given 3 prompts"):
        decoder.prefill([[2], [2], [2]])


def test_a_package_of_an_encoder_is_opened_with_its_own_class(folder: Path) -> None:
    for target in TARGETS:
        package = compiled("t5", target, folder).package.folder
        with pytest.raises(PackageError, match="of an encoder and a decoder: open it with QEFFAutoModelForSeq2SeqLM"):
            QEFFAutoModelForCausalLM.from_package(package).generate(torch.ones((2, 3), dtype=torch.long))


def test_a_folder_compiles_once_and_for_each_length(tmp_path: Path) -> None:
    seq2seq.tiny("bart").save_pretrained(tmp_path / "model")
    model = QEFFAutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    shapes: dict[str, Any] = {"target": "onnxruntime", "compile_dir": tmp_path / "out", "batch_size": 2}
    model.compile(encoder_ctx_len=LENGTH, ctx_len=32, **shapes)
    first = open_package(tmp_path / "out")
    assert set(first.programs) == {"main", ENCODER} and not model.package.cached
    same(model, "bart", seq2seq.read("bart"))
    model.compile(encoder_ctx_len=LENGTH, ctx_len=32, **shapes)
    assert model.package.cached
    model.compile(encoder_ctx_len=LENGTH + 1, ctx_len=32, **shapes)
    assert not model.package.cached and open_package(tmp_path / "out").key != first.key
    copied = pickle.loads(pickle.dumps(model))
    same(copied, "bart", seq2seq.read("bart"))


def test_the_feature_extractor_of_a_folder_tells_the_length(tmp_path: Path) -> None:
    config = AutoConfig.for_model("whisper", **{**MODELS["whisper"].config, "max_source_positions": 50})
    make: Any = AutoModelForSpeechSeq2Seq.from_config
    make(config).save_pretrained(tmp_path / "model")
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path / "model")
    model = QEFFAutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    model.compile(target="onnxruntime", compile_dir=tmp_path / "out")
    decoder = model.runner().decoder
    shapes = {s.input: s.shape for s in decoder.session.interface.residents if s.written_by_host}
    assert set(shapes.values()) == {("batch_size", 4, 50, 8)} and decoder.ctx_len == 64


def test_what_does_not_fit_is_told(folder: Path) -> None:
    model, given = compiled("bart", "onnxruntime", folder), seq2seq.read("bart")
    long = seq2seq.read("bart", length=LENGTH + 1)
    with pytest.raises(RuntimeInputError, match=f"a length of {LENGTH + 1}, and the model is compiled for {LENGTH}"):
        model.generate(**long)
    with pytest.raises(RuntimeInputError, match="there is nothing to encode: give input_ids"):
        model.generate(max_new_tokens=2)
    with pytest.raises(RuntimeInputError, match="42 tokens do not fit the compiled context of 32"):
        model.generate(**given, max_new_tokens=41)
    with pytest.raises(RuntimeInputError, match="a prompt of 33 tokens, and the compiled context has 32"):
        model.generate(**given, decoder_input_ids=torch.full((2, 33), 2), max_length=60)
    with pytest.raises(RuntimeInputError, match="num_beams > 1"):
        model.generate(**given, num_beams=2)
    with pytest.raises(RuntimeInputError, match="does not take max_new_token: did you mean max_new_tokens"):
        model.generate(**given, max_new_token=2)
    with pytest.raises(RuntimeInputError, match="compiled for a batch of 2, but got 3 rows"):
        model.generate(input_ids=torch.ones((3, 4), dtype=torch.long))
    with pytest.raises(RuntimeInputError, match=r"attention_mask is \[2, 5\] and input_ids \[2, 14\]"):
        model.generate(given["input_ids"], attention_mask=given["attention_mask"][:, :5])
    with pytest.raises(RuntimeInputError, match="inputs and input_ids are the same thing"):
        model.generate(given["input_ids"], input_ids=given["input_ids"])
    with pytest.raises(RuntimeInputError, match="a token outside the vocabulary of 99: use the model's tokenizer"):
        model.generate(torch.tensor([[5], [99]]))
    with pytest.raises(RuntimeInputError, match=r"generate needs input_ids of shape \[batch, tokens\].*not a ndarray"):
        model.generate(given["input_ids"].numpy())  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeInputError, match="input_ids is float32: give whole numbers"):
        model.generate(given["input_ids"].float())
    with pytest.raises(RuntimeInputError, match="a row of attention_mask is all padding"):
        model.generate(given["input_ids"], attention_mask=given["attention_mask"] * torch.tensor([[1], [0]]))
    with pytest.raises(RuntimeInputError, match="inputs and attention_mask are the same thing"):
        model.generate(given, attention_mask=given["attention_mask"])
    assert model.generate(given, max_new_tokens=2).tolist() == model.generate(**given, max_new_tokens=2).tolist()
    # A default of the model is cut to what fits.
    assert model.generate(**given, eos_token_id=98, min_length=33, do_sample=False, num_beams=1).shape[1] <= 33
    same(model, "bart", given)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 8, 50), "the encoder takes just 60"),
        ((2, 8, 61), "a length of 61, and the model is compiled for 60"),
        ((2, 60), r"input_features is \[2, 60\], and the model is compiled for"),
        ((2, 7, 50), r"input_features is \[2, 7, 50\], and the model is compiled for"),
    ],
)
def test_a_recording_of_another_length_is_told(shape: tuple[int, ...], said: str, folder: Path) -> None:
    decoder = compiled("whisper", "onnxruntime", folder).runner().decoder
    decoder.given = {"input_features": np.zeros(shape, dtype=np.float32)}
    with pytest.raises(RuntimeInputError, match=said):
        decoder.prefill([[2], [2]])


def test_a_recording_that_is_none_and_an_answer_that_is_not_there(folder: Path) -> None:
    model, features = compiled("whisper", "onnxruntime", folder), seq2seq.read("whisper")["input_features"]
    with pytest.raises(RuntimeInputError, match=r"input_features is a ndarray: give a tensor, as the processor"):
        model.generate(features.numpy())  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeInputError, match="return_token_timestamps needs the decoder's attention"):
        model.generate(features, return_token_timestamps=True)


def test_models_and_lengths_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="is more than the 64 positions of BartForConditionalGeneration"):
        opened("bart").compile(encoder_ctx_len=65)
    with pytest.raises(CompileError, match="must be a whole number of at least 1, or several, not 0"):
        opened("bart").compile(encoder_ctx_len=0)
    with pytest.raises(CompileError, match="ctx_len=65 is more than the 64 positions"):
        opened("bart").compile(ctx_len=65, encoder_ctx_len=4, target="onnxruntime", compile_dir=tmp_path / "out")
    with pytest.raises(CompileError, match="makes 15 positions of the longest recording and never 99"):
        opened("speech_to_text").compile(encoder_ctx_len=99)
    with pytest.raises(UnsupportedModelError, match="has an encoder that cannot be run: ValueError: Whisper expects"):
        opened("whisper").compile(encoder_ctx_len=12)
    with pytest.raises(ModelLoadError, match="the processor is of type NoneType"):
        QEFFAutoModelForSpeechSeq2Seq(seq2seq.tiny("whisper"), None)
    seq2seq.tiny("bart").save_pretrained(tmp_path / "model")
    with pytest.raises(CompileError, match="open it with QEFFAutoModelForSeq2SeqLM"):
        QEFFAutoModelForCausalLM.from_pretrained(tmp_path / "model").compile(target="onnxruntime")
    with pytest.raises(PackageError, match="not compiled yet"):
        opened("bart").generate(**seq2seq.read("bart"))


def test_recordings_of_any_length_that_the_encoder_makes_so_many_positions_of() -> None:
    source = opened("speech_to_text")._source
    assert source is not None
    shapes = {s.name: s.shape for s in source.for_length(8).specs or ()}
    assert shapes == {"input_features": ("batch_size", 32, 8), "attention_mask": ("batch_size", 32)}


@pytest.mark.parametrize(("name", "target"), [("speech_to_text", "onnxruntime"), ("bart", "ai100")])
def test_several_lengths_have_programs_of_their_own(name: str, target: str, tmp_path: Path) -> None:
    model, lengths = opened(name), (8, MODELS[name].positions)
    model.compile(
        ctx_len=16, encoder_ctx_len=lengths, batch_size=2, target=target, compile_dir=tmp_path / "out", emit_only=True
    )
    again = type(model).from_package(tmp_path / "out")
    main, runner = seq2seq.main_input(name), again.runner()
    sizes = [(60, 8), (32, 8)] if MODELS[name].features else [(LENGTH,), (8,)]
    assert [decoder.shape for _, decoder in reversed(runner._lengths)] == sizes
    assert set(again.package.manifest.programs) >= {"main", f"decoder_{sizes[1][0]}"}
    for length in (sizes[1][0], sizes[0][0], 8 if MODELS[name].features else 5):
        given = seq2seq.read(name, length=length)
        if length in (size[0] for size in sizes):
            same(again, name, given)
            continue
        if MODELS[name].features:
            with pytest.raises(RuntimeInputError, match=r"is \[2, 8, 8\], and .* for \[2, 32, 8\], \[2, 60, 8\]: let"):
                again.generate(**given)
        else:  # a text is padded to the shortest that it fits
            assert runner._for(main, given[main])[1].shape == (8,)
            same(again, name, given)


def test_a_decoder_that_asks_its_encoder_for_a_type_reads_nothing_of_it() -> None:
    """Such as that of a mask: a cast to the type of a tensor is no use of the tensor."""
    model = copy.deepcopy(theirs("speech_to_text"))
    decoder = model.model.decoder

    kind: Any = type(decoder)

    def typed(self: Any, encoder_hidden_states: Any, encoder_attention_mask: Any, **kwargs: Any) -> Any:
        seen = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2])
        seen = seen.masked_fill(encoder_attention_mask == 0, 0)
        return kind.forward(self, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=seen, **kwargs)

    decoder.__class__ = type("Typed", (kind,), {"forward": typed})
    source = QEFFAutoModelForSpeechSeq2Seq(model, seq2seq.Extractor("speech_to_text"))._source
    assert source is not None
    names = [str(value.name) for value in source.for_length(15).lower().graph.inputs]
    assert names[:3] == ["input_ids", "position_ids", "encoder_attention_mask"] and "past_key_cross.2" in names[3:]
