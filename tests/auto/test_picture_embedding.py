"""`QEFFAutoModel` of pictures and text, and rerankers: embeddings and scores are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qeff_ir import QEFFAutoModel, QEFFAutoModelForCausalLM, QEFFAutoModelForImageTextToText
from qeff_ir.errors import CompileError, PackageError, PassError, RuntimeInputError
from qeff_ir.numerics import bound, error_over_rms
from tests import multimodal, processors, support
from tests.processors import PROCESSORS

LIMIT = bound(6 * (3 + 3) + 3)
"""Six products for each layer of the tower and of the language model, and those between."""
SHAPES: dict[str, Any] = {"prefill_seq_len": 8, "ctx_len": 96, "num_images": 2, "emit_only": True}
TOKENS = [7, 33]
"""Stand for "no" and "yes"."""


def rows(name: str) -> tuple[list[str], list[list[Any]]]:
    """Rows of several lengths: of two pictures and words, of one picture alone, and of words alone."""
    place, size = PROCESSORS[name].place, PROCESSORS[name].size
    texts = [f"w5 w6 {place} w7 w8 {place} w10", place, "w4 w5 w9"]
    return texts, [[processors.picture(size, 1), processors.picture(size, 2)], [processors.picture(size, 3)], []]


def processed(name: str, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
    pictures = {"images": images} if any(images) else {}
    return dict(processors.processor(name)(text=texts, return_tensors="pt", padding=True, **pictures))


def last(name: str, text: str, images: list[Any], *, scores: bool = False) -> Any:
    """The hidden state of the last token by transformers, or its logits."""
    model = multimodal.lively(name)
    with torch.no_grad():
        if scores:
            return model(**processed(name, [text], [images])).logits[0, -1]
        return model.base_model(**processed(name, [text], [images])).last_hidden_state[0, -1]


def unit(row: torch.Tensor, features: int | None = None) -> Any:
    return torch.nn.functional.normalize(row[:features], dim=0).numpy()


def opened(model: Any, name: str, out: Path, target: str = "onnxruntime", **more: Any) -> QEFFAutoModel:
    made = QEFFAutoModel(model, pooling="last", normalize=True, processor=processors.processor(name), **more)
    options: dict[str, Any] = {**SHAPES, "batch_size": 2, "image_size": PROCESSORS[name].size, "target": target}
    assert made.compile(compile_dir=out, **options) == str(out)
    return made


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModel:
    return opened(multimodal.lively("qwen3_vl"), "qwen3_vl", tmp_path_factory.mktemp("grids") / "out", "ai100")


@pytest.mark.nightly
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_a_base_model_embeds_pictures_and_text(name: str, target: str, tmp_path: Path) -> None:
    model = opened(multimodal.lively(name).base_model, name, tmp_path, target)
    texts, images = rows(name)
    found = model.encode(texts, images=images, processor=processors.processor(name))
    for row, text, own in zip(found, texts, images, strict=True):
        assert error_over_rms(row, unit(last(name, text, own))) <= 3 * LIMIT  # some towers are wider than deep


def test_rows_of_any_number_and_length_are_embedded(grids: QEFFAutoModel) -> None:
    texts, images = rows("qwen3_vl")
    right = [unit(last("qwen3_vl", text, own)) for text, own in zip(texts, images, strict=True)]
    found = grids.encode(texts, images=images, processor=processors.processor("qwen3_vl"))
    assert found.shape == (3, 32)
    given = processed("qwen3_vl", texts, images)
    together = grids.generate(given)["output"]
    alone = grids.encode(texts[2], processor=processors.processor("qwen3_vl"))
    for row, wanted in zip((*found, *together, alone), (*right, *right, right[2]), strict=True):
        assert error_over_rms(row, wanted) <= LIMIT
    other = unit(last("qwen3_vl", texts[1], images[0][:1]))
    assert error_over_rms(other, right[1]) > 1000 * LIMIT  # the picture is seen
    again = QEFFAutoModel.from_package(grids.package.folder)
    assert again.pools
    assert np.array_equal(again.encode(texts, images=images, processor=processors.processor("qwen3_vl")), found)


def test_a_folder_needs_no_head(tmp_path: Path) -> None:
    model = multimodal.build("qwen3_vl", 0.3)
    base: Any = model.base_model
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.ones(multimodal.VOCAB, 32))  # not that of the tokens
    base.save_pretrained(tmp_path / "model")
    processors.processor("qwen3_vl").save_pretrained(tmp_path / "model")
    found = QEFFAutoModel.from_pretrained(tmp_path / "model", pooling="last", normalize=True, dim=8)
    options: dict[str, Any] = {**SHAPES, "image_size": PROCESSORS["qwen3_vl"].size, "target": "onnxruntime"}
    found.compile(compile_dir=tmp_path / "out", **options)
    texts, images = rows("qwen3_vl")
    with torch.no_grad():
        hidden = model.base_model(**processed("qwen3_vl", texts[:1], images[:1])).last_hidden_state[0, -1]
    asked: dict[str, Any] = {"images": images[0], "processor": processors.processor("qwen3_vl")}
    assert error_over_rms(found.encode(texts[0], **asked), unit(hidden, 8)) <= LIMIT
    # The host looks up the tokens, and each program has a pipeline of its own.
    edits: dict[str, Any] = {"token_embedding": "host", "pipeline": {"main": "-fuse-rotary"}}
    found.compile(compile_dir=tmp_path / "host", **options, **edits)
    assert error_over_rms(found.encode(texts[0], **asked), unit(hidden, 8)) <= LIMIT
    programs = {name: one.report["pipeline"] for name, one in found.package.manifest.programs.items()}
    assert "token-embedding" in programs["main"] and "embedding-output" in programs["main"]
    assert "fuse-rotary" not in programs["main"] and "fuse-rotary" in programs["vision"]
    again = QEFFAutoModel.from_package(tmp_path / "host", checkpoint=tmp_path / "model")
    assert error_over_rms(again.encode(texts[0], **asked), unit(hidden, 8)) <= LIMIT
    wide = QEFFAutoModel.from_pretrained(tmp_path / "model", pooling="last", dim=33)
    with pytest.raises(PassError, match="dim is 33, but an embedding has 32 features"):
        wide.compile(compile_dir=tmp_path / "wide", **options)


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("ai100", marks=pytest.mark.nightly)])
def test_a_reranker_of_pictures_and_text(target: str, tmp_path: Path) -> None:
    processor = processors.processor("qwen3_vl")
    model = QEFFAutoModelForImageTextToText(multimodal.lively("qwen3_vl"), processor)
    options: dict[str, Any] = {**SHAPES, "batch_size": 2, "image_size": PROCESSORS["qwen3_vl"].size, "target": target}
    model.compile(compile_dir=tmp_path, **options)
    texts, images = rows("qwen3_vl")
    right = [
        last("qwen3_vl", text, own, scores=True)[TOKENS].softmax(0).numpy()
        for text, own in zip(texts, images, strict=True)
    ]
    found = model.score(prompts=texts, images=images, processor=processor, tokens=["w7", "w33"])
    together = model.score(tokens=TOKENS, **processed("qwen3_vl", texts, images))
    assert error_over_rms(found, np.stack(right)) <= LIMIT
    assert error_over_rms(together, np.stack(right)) <= LIMIT
    assert np.ptp(found[:, 1]) > 0.01
    with pytest.raises(PackageError, match="returns logits, and no embedding: open it with QEFFAutoModelForImage"):
        QEFFAutoModel.from_package(tmp_path).encode(texts[2], processor=processor)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"tokens": [7]}, r"tokens is \[7\]: give two or more that differ"),
        ({"tokens": [7, 7, 33]}, "give two or more that differ"),
        ({"tokens": 7}, "tokens is 7: give two or more in a list"),
        ({"tokens": "w7"}, "tokens is 'w7': give two or more in a list"),
        ({"tokens": ["w7", "yes"]}, "the tokenizer does not know 'yes'"),
        ({"tokens": [7, 99]}, "the token 99 is not in the vocabulary of 99"),
        ({"tokens": ["w7", "w8 w9"]}, "'w8 w9' is 2 tokens"),
    )
    for given, message in wrong:
        with pytest.raises(RuntimeInputError, match=message):
            model.score(prompts=texts[2], processor=processor, **given)
    with pytest.raises(RuntimeInputError, match="give prompts, images and processor, or what the processor returns"):
        model.score(tokens=TOKENS)
    listed = {key: value.tolist() for key, value in processed("qwen3_vl", texts[2:], []).items()}
    assert np.array_equal(model.score(tokens=TOKENS, **listed)[0], together[2])
    with pytest.raises(RuntimeInputError, match=r"needs input_ids of shape \[batch, tokens\]"):
        model.score(tokens=TOKENS, input_ids=[[5, 6], [4]])
    with pytest.raises(RuntimeInputError, match="attention_mask is a str: give a tensor of the shape of input_ids"):
        model.score(tokens=TOKENS, input_ids=[[5, 6]], attention_mask="11")


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("ai100", marks=pytest.mark.nightly)])
def test_a_text_decoder_embeds_and_ranks(target: str, tmp_path: Path) -> None:
    _, model = support.tiny("qwen3")
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 4, 3, 2], [0, 11, 12, 40, 41]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    made = QEFFAutoModel(model, pooling="last", normalize=True)
    made.compile(seq_len=[4, 8], target=target, compile_dir=tmp_path / "embedder", emit_only=True)
    found = made.generate(input_ids=ids, attention_mask=mask)["output"]
    for row, wanted in zip(found, hidden, strict=True):
        assert error_over_rms(row, unit(wanted)) <= LIMIT
    ranker = QEFFAutoModelForCausalLM(model)
    options: dict[str, Any] = {"target": target, "prefill_seq_len": 2, "ctx_len": 8, "batch_size": 2, "emit_only": True}
    ranker.compile(compile_dir=tmp_path / "ranker", **options)
    scores = ranker.score(tokens=TOKENS, input_ids=ids, attention_mask=mask)
    assert error_over_rms(scores, logits[:, TOKENS].softmax(1).numpy()) <= LIMIT
    tokenizer = processors.tokenizer({})
    assert np.array_equal(ranker.score(tokens=["w7", "w33"], prompts="w5 w6 w7 w8 w9", tokenizer=tokenizer), scores[:1])
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "give prompts and tokenizer, or input_ids"),
        ({"prompts": "w5"}, "prompts need tokenizer="),
        ({"input_ids": ids + 99}, "outside the vocabulary"),
        ({"input_ids": ids, "tokens": ["w7", "w33"]}, "the token 'w7' is a text: give tokenizer="),
    )
    for given, message in wrong:
        with pytest.raises(RuntimeInputError, match=message):
            ranker.score(**dict[str, Any]({"tokens": TOKENS, **given}))


def test_what_does_not_go_together_is_told(grids: QEFFAutoModel, tmp_path: Path) -> None:
    model, size = multimodal.lively("qwen3_vl"), PROCESSORS["qwen3_vl"].size
    processor = processors.processor("qwen3_vl")
    models: tuple[tuple[dict[str, Any], str], ...] = (
        ({"pooling": "mean"}, "pictures and text are embedded by the hidden state of the last token alone"),
        ({}, "pictures and text are embedded by the hidden state of the last token alone"),
        ({"pooling": "last", "processor": None}, "a model in memory needs processor="),
    )
    for more, message in models:
        with pytest.raises(CompileError, match=message):
            QEFFAutoModel(model, **{"processor": processor, **more}).compile(image_size=size, target="onnxruntime")
    plain = QEFFAutoModel(support.tiny("qwen3")[1], pooling="last")
    with pytest.raises(CompileError, match="seq_len is for text alone"):
        plain.compile(image_size=size, seq_len=8)
    for name, value in (("prefill_only", False), ("num_speculative_tokens", 2)):
        with pytest.raises(CompileError, match=f"{name} is for models that write"):
            plain.compile(image_size=size, **{name: value})
    with pytest.raises(CompileError, match="are for pictures: give image_size as well"):
        plain.compile(ctx_len=8)
    with pytest.raises(CompileError, match="there is a pipeline for the program 'vision'"):
        plain.compile(seq_len=8, target="onnxruntime", pipeline={"vision": "-unflatten"})
    plain.compile(seq_len=8, target="onnxruntime", compile_dir=tmp_path)
    with pytest.raises(RuntimeInputError, match="the package is for text alone"):
        plain.encode("w5", images=[], tokenizer=processors.tokenizer({}))
    calls: tuple[tuple[dict[str, Any], str], ...] = (
        ({"truncate": True}, "truncate is for text alone"),
        ({"batch_size": 3}, "batch_size is for text alone"),
        ({"processor": None}, "without a tokenizer"),
    )
    for given, message in calls:
        with pytest.raises(RuntimeInputError, match=message):
            grids.encode("w5", **{"processor": processor, **given})
    with pytest.raises(RuntimeInputError, match="prompt 0 is a int: give a text"):
        grids.encode([5], processor=processor)  # pyright: ignore[reportArgumentType]
    texts, images = rows("qwen3_vl")
    given = processed("qwen3_vl", texts[1:2], images[1:2])
    with pytest.raises(RuntimeInputError, match="the model takes no pixels"):
        grids.generate(given, pixels=5)
    with pytest.raises(RuntimeInputError, match="returns embeddings, and no logits: open it with QEFFAutoModel"):
        QEFFAutoModelForImageTextToText.from_package(grids.package.folder).score(tokens=TOKENS, **given)
    with pytest.raises(PackageError, match="cannot be compiled again"):
        QEFFAutoModel.from_package(grids.package.folder).compile(image_size=size)
