"""Tells when what the runtime calls of transformers' generation, and wraps in one place, moves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin

from qeff_ir.frontend.versions import CACHE
from qeff_ir.runtime import private
from tests import support

MIXIN: Any = GenerationMixin  # its methods are typed for models that generate, not for itself


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (MIXIN._prepare_generation_config, ["self", "generation_config", "kwargs"]),
        (MIXIN._prepare_special_tokens, ["self", "generation_config"]),
        (
            MIXIN._prepare_attention_mask_for_generation,
            ["self", "inputs_tensor", "generation_config", "model_kwargs"],
        ),
        (MIXIN._get_stopping_criteria, ["self", "generation_config", "stopping_criteria", "tokenizer"]),
        (StoppingCriteriaList.__call__, ["self", "input_ids", "scores"]),
    ],
    ids=lambda v: getattr(v, "__qualname__", ""),
)
def test_signatures_begin_as_expected(function: Callable[..., Any], expected: list[str]) -> None:
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected


def test_settings_are_merged_without_touching_the_object() -> None:
    model = support.tiny("llama")[1]
    given = GenerationConfig(max_new_tokens=5)
    config, rest = private.merge(model, given, {"top_k": 3, "strange": 1})
    assert (config.max_new_tokens, config.top_k, config.do_sample, config.num_beams) == (5, 3, False, 1)
    assert config.pad_token_id == model.generation_config.pad_token_id is not None
    assert (given.top_k, given.pad_token_id, rest) == (None, None, {"strange": 1})


def test_special_tokens_and_masks_are_transformers_own() -> None:
    model = support.tiny("llama")[1]
    config = GenerationConfig(eos_token_id=[7, 9])
    assert private.set_special_tokens(model, config) == (7, [7, 9])
    ids = torch.tensor([[7, 5], [4, 5]])
    assert private.infer_mask(model, ids, config).tolist() == [[1, 1], [1, 1]]
    config = GenerationConfig(eos_token_id=9, pad_token_id=7)
    assert private.set_special_tokens(model, config) == (7, [9])
    assert private.infer_mask(model, ids, config).tolist() == [[0, 1], [1, 1]]
    assert private.set_special_tokens(model, GenerationConfig()) == (None, [])


def test_a_result_calls_the_cache_as_models_do() -> None:
    assert CACHE in {field.name for field in fields(GenerateDecoderOnlyOutput)}
