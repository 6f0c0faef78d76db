"""A model that runs its layers twice keeps a state for each run: it puts copies of its layers into the cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from qeff_ir import numerics
from qeff_ir.frontend.capture import states
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.versions import CACHE
from qeff_ir.ir.residents import Resident
from qeff_ir.specialize import specialize
from qeff_ir.testing.trace import compare, reference_trace, session_trace
from tests import support
from tests.models import WINDOW, build

LAYERS = 2


def twice(self: Any, input_ids: torch.Tensor, position_ids: Any = None, use_cache: bool = True, **kwargs: Any) -> Any:
    cache: Any = kwargs.get(CACHE)
    model = self.model
    if cache is None:
        cache = DynamicCache(config=self.config)
    if position_ids is None:
        position_ids = (torch.arange(input_ids.shape[1]) + cache.get_seq_length())[None]
    x = model.embed_tokens(input_ids)
    make = create_sliding_window_causal_mask if getattr(self.config, "sliding_window", None) else create_causal_mask
    mask = make(self.config, x, kwargs.get("attention_mask"), **{CACHE: cache}, position_ids=position_ids)
    embeddings = model.rotary_emb(x, position_ids=position_ids)
    if len(cache.layers) == LAYERS:
        cache.layers += [copy.deepcopy(layer) for layer in cache.layers]
    for first in (0, LAYERS):
        for index, layer in enumerate(model.layers):
            layer.self_attn.layer_idx = first + index
            x = layer(
                x,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=embeddings,
                **{CACHE: cache},
            )
    return CausalLMOutputWithPast(logits=self.lm_head(model.norm(x)), **{CACHE: cache})


def looped(name: str) -> PreTrainedModel:
    model = build(name)[1]
    assert len(model.model.layers) == LAYERS
    model.__class__ = type("Looped", (type(model),), {"forward": twice})
    return model


@pytest.mark.parametrize(("name", "window"), [("llama", None), ("mistral", WINDOW)])
def test_each_run_of_a_layer_has_a_cache_of_its_own(name: str, window: int | None, tmp_path: Path) -> None:
    model = looped(name)
    reference = reference_trace(model, support.PROMPTS, support.STEPS)
    module = Source(Memory(model)).lower()
    kept = [(state.layer, state.kind, state.window) for state in module.states]
    assert kept == [(layer, role, window) for layer in range(2 * LAYERS) for role in ("key", "value")]
    bound = numerics.bound(numerics.depth(module))
    specialize(module, support.OPTIONS)
    support.apply(module, support.CANONICAL)
    trace = session_trace(support.open_decoder(module, tmp_path), support.PROMPTS, reference.tokens)
    assert compare(trace, reference).equal(bound)


@pytest.mark.parametrize(
    ("kept", "kind"),
    [
        ([("conv", 0), ("conv", 1), ("recurrent", 1)], states.RecurrentLayer),
        ([("key", 0), ("value", 0), ("conv", 0), ("conv", 1)], states.HybridLayer),
        ([("key", 0), ("value", 0), ("indexer", 0)], states.AttentionLayer),
    ],
)
def test_an_added_layer_is_of_the_kind_that_keeps_its_states(kept: list[states.Key], kind: type[Any]) -> None:
    model, positions = support.tiny("llama")[1], torch.zeros(2, 5, dtype=torch.long)
    past = {
        Resident(LAYERS, role, (), ir.DataType.FLOAT, index=index): torch.full((2, 3), float(number))
        for number, (role, index) in enumerate(kept)
    }
    cache = states.CapturingCache(model, positions, past)
    assert [type(layer) for layer in cache.captured[LAYERS:]] == [kind]
    for state, tensor in past.items():
        assert cache.result(state) is tensor
    copied: Any = copy.deepcopy(cache.captured[LAYERS])
    assert type(copied) is kind and copied.held.past == {} and copied.held.position_ids is positions
