"""Answers of a form: a model that writes anything writes what fits a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.errors import RuntimeInputError
from qeff_ir.serve.guided import Guide
from qeff_ir.serve.opening import serve_writer
from qeff_ir.serve.schema import ResponseFormat

from .servers import NAME, Running, of_bytes, running

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["color", "count"],
    "additionalProperties": False,
}
EOS = 256
"""The token that ends an answer, behind those of the bytes."""
FORM: Any = {"type": "json_schema", "json_schema": {"name": "things", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model of random weights that writes bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("bytes"), of_bytes()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=EOS, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    model = QEFFAutoModelForCausalLM.from_pretrained(folder / "model")
    model.compile(target="onnxruntime", ctx_len=128, compile_dir=folder / "package")
    with running(serve_writer(model, NAME)) as found:
        yield found


def chat(server: Running, form: Any, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": "é"}]
    return server.client.chat.completions.create(
        model=NAME, messages=messages, response_format=form, max_tokens=60, **more
    )


def test_every_sample_fits_the_schema_and_ends_by_itself(server: Running) -> None:
    found = chat(server, FORM, n=8, seed=1)
    things = [json.loads(choice.message.content) for choice in found.choices]
    assert all(
        set(t) == {"color", "count"} and t["color"] in ("red", "blue") and 10 <= t["count"] <= 99 for t in things
    )
    assert len({json.dumps(t) for t in things}) > 2
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    free = chat(server, {"type": "text"}, n=2, seed=1)
    with pytest.raises(json.JSONDecodeError):
        json.loads(free.choices[0].message.content)
    assert chat(server, {"type": "json_object"}, seed=2).choices[0].message.content.startswith("{")


def test_a_schema_that_cannot_be_followed_is_refused(server: Running) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}}
    with pytest.raises(openai.BadRequestError, match="the schema cannot be followed"):
        chat(server, bad)
    with pytest.raises(openai.BadRequestError, match="json_schema belongs to the type json_schema"):
        chat(server, {"type": "json_schema"})


def test_a_mask_is_that_of_the_grammar_and_a_wrong_token_is_told() -> None:
    tokenizer = of_bytes()
    guide = Guide(tokenizer, 300, frozenset({EOS}))
    constraint = guide.constraints(ResponseFormat(type="json_object"), 2)[0]
    assert constraint is not None
    (brace,) = tokenizer.encode("{", add_special_tokens=False)
    assert constraint.mask().shape == (300,) and np.flatnonzero(constraint.mask()).tolist() == [brace]
    constraint.advance(brace)
    assert constraint.mask().sum() > 1 and not constraint.mask()[257:].any()
    with pytest.raises(RuntimeInputError, match="response_format cannot be followed"):
        constraint.advance(brace)
