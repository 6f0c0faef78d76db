"""P10 of the frontend: drawn configurations of real architectures, lowered, against transformers itself."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from backends import find_backend
from qeff_ir.compiler import specialize
from qeff_ir.frontend.source import MemorySource
from qeff_ir.module import WEIGHT_KEY, Module
from qeff_ir.testing import tolerance
from qeff_ir.testing.judge import explained, options, session_answers
from qeff_ir.testing.recipe import Recipe
from qeff_ir.testing.strategies import CONFIGS, Request, configs, requests
from tests.properties import scaled
from tests.properties.test_numbers import opened


def exact(model: torch.nn.Module, request: Request) -> np.ndarray:
    """transformers' own answers, each from one pass over all tokens of a row."""
    found = []
    with torch.no_grad():
        for _, rows, _ in request.feeds():
            found += [model(torch.tensor([r]), use_cache=False).logits[0, -1].numpy() for r in rows if r is not None]
    return np.stack(found)


@functools.cache
def traced(config: str) -> tuple[PreTrainedModel, Module]:
    """The model of a configuration, as JSON, and its module, which refers to the model's weights.

    There are a few hundred configurations, each takes a second to lower, and lowering never reads a weight.
    """
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)), dtype=torch.float32).eval()
    return model, MemorySource(model).lower()


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Give every matrix new numbers, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=CONFIGS["initializer_range"])


@pytest.mark.parametrize(
    ("model_type", "target"), [("mistral", "onnxruntime"), ("llama", "ai100"), ("gemma3_text", "onnxruntime")]
)
@scaled(0.04)
@given(st.data())
def test_p10_drawn_configurations_answer_as_transformers(model_type: str, target: str, data: st.DataObject) -> None:
    config: dict[str, Any] = data.draw(configs(model_type, windowed=model_type != "llama"))
    request = data.draw(requests(Recipe(vocab=CONFIGS["vocab_size"])))
    model, lowered = traced(json.dumps(config, sort_keys=True))
    draw_weights(model, request.seed)
    module = lowered.clone()
    assert {s.window for s in module.states} <= {None, config.get("sliding_window")}
    stored = [v.const_value for v in module.graph.initializers.values() if WEIGHT_KEY in v.metadata_props]
    assert len(stored) == len({p.data_ptr() for p in model.parameters()})  # tied weights are one
    specialize(module, options(request))
    limit = tolerance.bound(tolerance.depth(module))
    with explained("P10 frontend", module, request=request), tempfile.TemporaryDirectory() as folder:
        session = opened(module, request, (target, find_backend(target).pipeline), Path(folder))
        error = tolerance.error_over_rms(session_answers(session, request), exact(model, request))
        assert error <= limit, f"{config}: {error / limit:.2f} x the bound"
