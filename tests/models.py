"""Tiny random models, as data: the only place of the repository that names architectures.

Every model is small enough for a laptop and complete: grouped heads, windows shorter than the context, soft-caps,
sinks, experts. Weights are drawn with a standard deviation above transformers' default of 0.02, so that a wrong mask,
scale or position shows in the logits, and biases and scales are not the 0 and 1 that would hide that they are dropped.

The models are well-conditioned: transformers in float32 stays within about 0.7 of `tolerance.bound` of itself in
float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 97
WINDOW = 6
"""Of all sliding-window layers: shorter than a prefill chunk of 8 tokens, and much shorter than the context."""


@dataclass(frozen=True)
class TinyModel:
    """A configuration of a tiny model.

    Attributes:
        model_type: transformers' name of the architecture.
        config: What differs from the architecture's defaults.
        windowed: Layers whose attention has a window.
        post_norm: Added to the scales of norms after a block. Freshly made ones let the blocks outweigh the embedding,
            whose exact numbers are what makes the sum well-conditioned; trained models have small scales there.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    windowed: tuple[int, ...] = ()
    post_norm: float = 0.0


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("llama", _COMMON),
    "gpt2": TinyModel(
        "gpt2",
        {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.05,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "qwen2": TinyModel("qwen2", _COMMON),
    "qwen3": TinyModel("qwen3", _COMMON),
    "mistral": TinyModel("mistral", {**_COMMON, "sliding_window": WINDOW}, windowed=(0, 1)),
    "gemma2": TinyModel(
        "gemma2",
        {
            **_COMMON, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "initializer_range": 0.1,
        },
        post_norm=-0.7,
        windowed=(0,),
    ),
    "gemma3": TinyModel(
        "gemma3_text",
        {
            **_COMMON, "sliding_window": WINDOW, "num_hidden_layers": 3, "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "initializer_range": 0.1,
        },
        post_norm=-0.7,
        windowed=(0, 1),
    ),
    "phi3": TinyModel("phi3", _COMMON),
    "mixtral": TinyModel("mixtral", {**_COMMON, "num_local_experts": 4}),
    "gpt-oss": TinyModel(
        "gpt_oss",
        {
            **_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        windowed=(0,),
    ),
    "bloom": TinyModel(
        "bloom",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.05,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        },
    ),
    "falcon": TinyModel(  # one key/value head for all queries, and attention of its own
        "falcon",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "initializer_range": 0.05, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "deepseek-v3": TinyModel(
        "deepseek_v3",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
            "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "max_position_embeddings": 256, "initializer_range": 0.05, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
        },
    ),
}  # fmt: skip


def build(name: str, seed: int = 0, **changes: Any) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The model called `name`, float32, seeded; `changes` are made to its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = MODELS[name]
    config = AutoConfig.for_model(tiny.model_type, **{**tiny.config, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            if "post_" in key:
                tensor.add_(tiny.post_norm)
    return config, model
