"""Rotary embeddings whose frequencies depend on the length of what was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.errors import CompileError, UnsupportedModelError
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from tests import support
from tests.frontend.test_refusals import OwnMask
from tests.models import build

ORIGINAL = 16
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.2, 3.2, 4.3],
    "original_max_position_embeddings": ORIGINAL,
}


def test_frequencies_that_switch_with_the_length_bound_the_context() -> None:
    model = build("phi3", rope_parameters=ROPE, original_max_position_embeddings=ORIGINAL)[1]
    compiled = QEFFAutoModelForCausalLM(model)
    with pytest.raises(CompileError, match=f"is more than the {ORIGINAL} positions"):
        compiled.compile(target="onnxruntime", prefill_seq_len=8, ctx_len=ORIGINAL + 1)
    compiled.compile(target="onnxruntime", prefill_seq_len=8, ctx_len=ORIGINAL)  # the model was left as it was
    prompt = torch.tensor(support.prompts([9]))
    expected = support.generate(model, input_ids=prompt, max_new_tokens=7)
    assert compiled.generate(prompt, max_new_tokens=7).tolist() == expected.tolist()


def test_a_longrope_of_some_layers_bounds_the_context_as_well() -> None:
    kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": ROPE}
    assert Source(Memory(build("gemma3", rope_parameters=kinds)[1])).lower().dims["ctx_len"].maximum == ORIGINAL


@pytest.mark.parametrize("by_layer", [False, True])
def test_frequencies_that_grow_bound_the_context_to_where_they_begin_to(by_layer: bool) -> None:
    """Up to the original length they are plain, also of a model that has been used beyond it."""
    kind: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    name, changes = "llama", kind
    if by_layer:
        name, changes = (
            "gemma3",
            {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": kind},
        )
    model = build(name, rope_parameters=changes, max_position_embeddings=ORIGINAL)[1]
    prompt = torch.tensor(support.prompts([9]))
    expected = support.generate(model, input_ids=prompt, max_new_tokens=7)
    with torch.no_grad():
        longer = model(torch.tensor(support.prompts([3 * ORIGINAL]))).logits
    grown = {n: b.clone() for n, b in model.named_buffers()}
    compiled = QEFFAutoModelForCausalLM(model)
    with pytest.raises(CompileError, match=f"is more than the {ORIGINAL} positions"):
        compiled.compile(target="onnxruntime", prefill_seq_len=8, ctx_len=ORIGINAL + 1)
    compiled.compile(target="onnxruntime", prefill_seq_len=8, ctx_len=ORIGINAL)
    assert compiled.generate(prompt, max_new_tokens=7).tolist() == expected.tolist()
    assert all(torch.equal(b, grown[n]) for n, b in model.named_buffers())  # the model was left as it was
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(support.prompts([3 * ORIGINAL]))).logits, longer)


class OwnRotary(OwnMask):
    """Takes other frequencies, in Python, from some position on."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, position_ids: Any = None, **_: Any) -> Any:
        if position_ids.max() > ORIGINAL:
            input_ids = input_ids + 1
        return super().forward(input_ids, past_key_values)


def test_a_branch_on_positions_says_where_it_is() -> None:
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(
        UnsupportedModelError, match=r"OwnRotary .* branches on what only a run knows, .*test_rope\.py:\d+"
    ):
        Source(Memory(OwnRotary(config).eval())).lower()
