"""Rotary embeddings whose frequencies depend on the length of what was read."""

from __future__ import annotations

import pytest
import torch

from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.errors import CompileError
from tests import support
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
