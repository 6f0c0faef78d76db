"""Each supported version of transformers is asked for its own names; a model of before keeps those of its code."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from qeff_ir.cli.yardstick import measure
from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.checkpoint.weights import memory_weights
from qeff_ir.frontend.export.lower import lower
from qeff_ir.frontend.versions import CACHE, cache_argument, next_cache
from qeff_ir.testing.trace import reference_trace
from tests import support


def test_the_installed_version_has_one_name_for_the_cache_of_its_models() -> None:
    model = support.tiny("llama")[1]
    assert CACHE in inspect.signature(model.forward).parameters
    assert CACHE in inspect.signature(masking_utils.create_causal_mask).parameters
    for output in (BaseModelOutputWithPast, CausalLMOutputWithPast, MoeCausalLMOutputWithPast):
        assert CACHE in inspect.signature(output).parameters


@pytest.mark.parametrize("name", ["llama", "mamba", "bloom"])
def test_a_second_run_goes_on_from_the_cache_of_the_first(name: str) -> None:
    model = support.tiny(name)[1]
    ids = torch.tensor([[5, 11, 7, 3, 9, 4]])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :4], use_cache=True)
        for index in (4, 5):
            out = model(ids[:, index : index + 1], use_cache=True, **next_cache(model, out))
    torch.testing.assert_close(out.logits[0, -1], whole[0, -1], rtol=0.0, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="returns no cache"):
        next_cache(model, model(ids, use_cache=False))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_model_is_handed_its_cache_by_the_name_that_its_code_has(name: str) -> None:
    """Code of another version, as a folder brings it; only that name reaches it."""
    model = support.build("llama")[1]
    forward = type(model).forward

    def one(self: PreTrainedModel, input_ids: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        handed = kwargs.pop(name)
        assert not {"cache", "past_key_values", "cache_params"} & set(kwargs)
        return forward(self, input_ids, position_ids=position_ids, **{CACHE: handed}, **kwargs)

    own = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = inspect.signature(one)
    *first, rest = signature.parameters.values()
    one.__signature__ = signature.replace(parameters=[*first, own, rest])
    model.__class__ = type("Written", (type(model),), {"forward": one})
    assert cache_argument(model.forward) == name
    assert [state.input for state in lower(model, memory_weights(model)).states][:2] == ["past_key.0", "past_value.0"]


def test_a_model_whose_signature_tells_nothing_is_handed_the_usual_name() -> None:
    assert cache_argument(lambda **kwargs: None) == CACHE


def test_the_yardstick_runs_models_of_either_kind_of_cache() -> None:
    model = support.build("mamba")[1]
    prompts = [[5, 11, 7], [3]]
    reference = reference_trace(model, prompts, 3)
    found = measure(lower(model, memory_weights(model)), model, prompts, reference)
    assert 0.0 <= found.own <= 16 * found.by_depth
    assert np.isfinite(found.limit)
