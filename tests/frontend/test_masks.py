"""Masks that a model adds to its scores: what they hide stays hidden, and a row that sees nothing is no NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from tests import support
from tests.frontend.test_refusals import OwnMask
from tests.models import VOCAB


class Infinite(OwnMask):
    """One attention layer, whose mask adds minus infinity to what it hides."""

    _supports_attention_backend = True
    _supports_sdpa = True
    is_causal = True

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)[:, None]
        seen: Any = create_causal_mask(self.config, x[:, 0], attention_mask=None, past_key_values=past_key_values)
        keys, values = past_key_values.update(x, x, 0)
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, x, keys, values, mask, scaling=0.4)
        return CausalLMOutputWithPast(logits=self.head(out[:, :, 0]))


def test_a_row_whose_mask_is_minus_infinity(tmp_path: Path) -> None:
    """Padding sees nothing: once lowered to a plain softmax, its row is NaN where that is added as it is."""
    model = Infinite(AutoConfig.for_model("llama", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)).eval()
    module = Source(Memory(model)).lower()
    support.apply(module, "canonicalize,attention{impl=grouped}")
    feeds = support.random_feeds(module, {"batch_size": 2, "seq_len": 3, "ctx_len": 16})
    assert feeds["position_ids"][1, -1] == -1
    logits = support.run_graph(module, tmp_path, feeds)["logits"]
    assert np.isfinite(logits).all()
