"""P10 of the frontend: drawn configurations of real architectures, lowered, against transformers itself."""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from backends import find_backend
from qeff_ir import numerics
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.specialize import specialize
from qeff_ir.testing.judge import answered, explained, options, session_answers
from qeff_ir.testing.recipe import BLOCK_SCALE, WEIGHT_SCALE, Recipe
from qeff_ir.testing.strategies import CONFIGS, Request, configs, requests
from tests.properties import scaled
from tests.properties.test_numbers import opened


class Doubled(TorchFunctionMode):
    """Double precision throughout: where a model's code goes up to single precision, it stays in double.

    The angle of a position is left as every model computes it, a product in single precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cos, torch.Tensor.sin):
            args = (args[0].double(), *args[1:])
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in kwargs.items()}
            if func is torch.Tensor.float:
                return args[0]
        return func(*args, **kwargs)


def exact(model: torch.nn.Module, request: Request) -> np.ndarray:
    """transformers' own answers in double precision, from one pass over all tokens of a row."""

    def whole(row: Sequence[int]) -> np.ndarray:
        with torch.no_grad(), Doubled():
            logits = model(torch.tensor([row]), use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        return logits.numpy()

    return answered(request, whole)


@functools.cache
def traced(config: str) -> tuple[PreTrainedModel, PreTrainedModel, Module]:
    """The model of a configuration, as JSON, a copy in double precision, and the module, which refers to its weights.

    There are a few hundred configurations, each takes a second to lower, and lowering never reads a weight.
    """
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)), dtype=torch.float32).eval()
    double = copy.deepcopy(model)
    for parameter in double.parameters():
        parameter.data = parameter.data.double()
    return model, double, Source(Memory(model)).lower()


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Give every matrix new numbers, in place, scaled as those of a `Recipe`: so that the answers are well-conditioned.

    With those that transformers draws, its own answers in single precision are off by most of the bound.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (BLOCK_SCALE if last else WEIGHT_SCALE) / math.sqrt(parameter.shape[-1])
                parameter.normal_(std=1.0 if "embed" in name else scale)


@pytest.mark.parametrize(
    ("model_type", "target"), [("mistral", "onnxruntime"), ("llama", "ai100"), ("gemma3_text", "onnxruntime")]
)
@scaled(0.04)
@given(st.data())
def test_p10_drawn_configurations_answer_as_transformers(model_type: str, target: str, data: st.DataObject) -> None:
    config: dict[str, Any] = data.draw(configs(model_type, windowed=model_type != "llama"))
    request = data.draw(requests(Recipe(vocab=CONFIGS["vocab_size"])))
    model, double, lowered = traced(json.dumps(config, sort_keys=True))
    draw_weights(model, request.seed)
    double.load_state_dict(model.state_dict())
    module = lowered.clone()
    assert {s.window for s in module.states} <= {None, config.get("sliding_window")}
    stored = [v.const_value for v in module.graph.initializers.values() if WEIGHT_KEY in v.metadata_props]
    assert len(stored) == len({p.data_ptr() for p in model.parameters()})  # tied weights are one
    specialize(module, options(request))
    limit = numerics.bound(numerics.depth(module))
    with explained("P10 frontend", module, request=request), tempfile.TemporaryDirectory() as folder:
        session = opened(module, request, (target, find_backend(target).pipeline), Path(folder))
        error = numerics.error_over_rms(session_answers(session, request), exact(double, request))
        assert error <= limit, f"{config}: {error / limit:.2f} x the bound"
