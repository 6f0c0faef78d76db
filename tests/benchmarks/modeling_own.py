"""A modelling file as a user writes one: on transformers' base classes, unknown to them and to us.

One layer of attention through the interface, with a bias that grows with the distance, and a gated feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class OwnConfig(PreTrainedConfig):
    model_type = "own-decoder"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class OwnLayer(nn.Module):
    def __init__(self, config: OwnConfig, index: int) -> None:
        super().__init__()
        self.config, self.index, self.is_causal = config, index, True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width = config.num_key_value_heads * self.head_dim
        self.norm = nn.LayerNorm(config.hidden_size)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_value = nn.Linear(config.hidden_size, 2 * width)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, past_key_values: Cache | None) -> torch.Tensor:
        y = self.norm(x)
        split = (*y.shape[:2], -1, self.head_dim)
        query = self.query(y).view(split).transpose(1, 2)
        key, value = (z.reshape(split).transpose(1, 2) for z in self.key_value(y).chunk(2, dim=-1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.index)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, _ = attend(self, query, key, value, mask, scaling=self.head_dim**-0.5, dropout=0.0)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(OwnLayer(config, i) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        counted = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.positions(counted)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values
        )
        for layer in self.layers:
            x = layer(x, mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)


AutoConfig.register("own-decoder", OwnConfig, exist_ok=True)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
