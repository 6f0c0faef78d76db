"""Models that would lower to something wrong are refused, each with a sentence that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source, open_source
from tests.models import build


def test_quantized_weights(tmp_path: Path) -> None:
    build("llama")[1].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    open_source(tmp_path)
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "unheard-of"}}))
    with pytest.raises(UnsupportedModelError, match=r"quantized by 'unheard-of' .* use the unquantized checkpoint"):
        open_source(tmp_path)


def test_quantized_weights_in_memory() -> None:
    model = build("llama")[1]
    Source(Memory(model)).lower()
    vars(model)["is_quantized"] = True  # which transformers says of a model whose layers it has exchanged
    with pytest.raises(UnsupportedModelError, match=r"quantized in memory: give the folder .* dequantize\(\)"):
        Source(Memory(model)).lower()


def test_an_encoder() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", **sizes, intermediate_size=64, is_decoder=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="attention sees later tokens, as an encoder's does"):
        Source(Memory(model)).lower()
    config.is_decoder = True
    assert Source(Memory(AutoModelForCausalLM.from_config(config).eval())).lower().states


class OwnMask(PreTrainedModel):
    """One attention layer with a cache, and a triangular mask that nobody can move."""

    config_class = type(AutoConfig.for_model("llama"))

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)[:, None]
        keys, values = past_key_values.update(x, x, 0)
        mask = torch.ones(x.shape[2], keys.shape[2], dtype=torch.bool).tril()
        scores = (x @ keys.transpose(2, 3)).masked_fill(~mask, -1e4)
        return CausalLMOutputWithPast(logits=self.head((scores.softmax(-1) @ values)[:, 0]))


def test_masks_of_the_models_own() -> None:
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="OwnMask builds attention masks by itself, so"):
        Source(Memory(OwnMask(config).eval())).lower()


class StoredMask(OwnMask):
    """Takes the mask that is captured, so that nothing but the stored table, which is not square, gives it away."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen = torch.nn.Buffer(torch.ones(1, 1, 64, 128, dtype=torch.bool).tril(), persistent=False)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)
        mask = create_causal_mask(self.config, x, attention_mask=None, past_key_values=past_key_values)
        keys, values = past_key_values.update(x[:, None], x[:, None], 0)
        stored = self.seen[:, :, : x.shape[1], : keys.shape[2]]
        scores = (x[:, None] @ keys.transpose(2, 3)).masked_fill(~stored, -1e4) + mask
        return CausalLMOutputWithPast(logits=self.head((scores.softmax(-1) @ values)[:, 0]))


def test_a_stored_mask_beside_the_models_own() -> None:
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="StoredMask builds attention masks by itself in the model itself"):
        Source(Memory(StoredMask(config).eval())).lower()
