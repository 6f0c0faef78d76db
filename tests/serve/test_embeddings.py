"""Embeddings over HTTP are those of `encode`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from qeff_ir import QEFFAutoModel
from qeff_ir.serve.opening import serve_embedder
from tests.auto.test_sentence_folders import transformer

from .servers import NAME, Running, running

TEXTS = ["a cat", "how do I reset my password", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModel:
    folder: Path = tmp_path_factory.mktemp("embed")
    found = QEFFAutoModel.from_pretrained(transformer(folder / "model"), pooling="mean", normalize=True)
    found.compile(target="onnxruntime", seq_len=[16], compile_dir=folder / "package")
    return QEFFAutoModel.from_package(folder / "package")


@pytest.fixture(scope="module")
def server(model: QEFFAutoModel) -> Iterator[Running]:
    with running(serve_embedder(model, NAME)) as found:
        yield found


def test_vectors_are_those_of_encode_in_both_encodings(server: Running, model: QEFFAutoModel) -> None:
    expected = model.encode(TEXTS)
    packed = server.client.embeddings.create(model=NAME, input=TEXTS)  # the client asks for base64
    plain = server.client.embeddings.create(model=NAME, input=TEXTS, encoding_format="float")
    for found in (packed, plain):
        assert [item.index for item in found.data] == [0, 1, 2]
        np.testing.assert_array_equal(np.array([item.embedding for item in found.data], dtype=np.float32), expected)
    assert packed.usage.prompt_tokens == sum(len(ids) for ids in model.tokenizer()(TEXTS)["input_ids"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    one = server.client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=expected.shape[1])
    np.testing.assert_array_equal(np.array(one.data[0].embedding, dtype=np.float32), expected[0])


def test_what_does_not_fit_is_refused(server: Running) -> None:
    client = server.client
    with pytest.raises(openai.BadRequestError, match="have 16 features: leave dimensions out"):
        client.embeddings.create(model=NAME, input="x", dimensions=8)
    with pytest.raises(openai.BadRequestError, match=r"text 0 has \d+ tokens, the model is compiled for 16"):
        client.embeddings.create(model=NAME, input="a " * 40)
    with pytest.raises(openai.BadRequestError, match=r"the field input\.0 does not fit"):
        client.embeddings.create(model=NAME, input=[1, 2])
    with pytest.raises(openai.BadRequestError, match="adds embeds texts and writes none: ask /v1/embeddings"):
        client.completions.create(model=NAME, prompt="x")
