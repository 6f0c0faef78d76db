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


COMMON: dict[str, Any] = {
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
    "llama": TinyModel("llama", COMMON),
    "gpt2": TinyModel(
        "gpt2",
        {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.05,
            "bos_token_id": 1, "eos_token_id": 2, "layer_norm_epsilon": 1e-3,  # not what the operator takes by itself
        },
    ),
    "qwen2": TinyModel("qwen2", COMMON),
    "qwen3": TinyModel("qwen3", {**COMMON, "head_dim": 16}),  # wide enough for all that kernels can do
    "mistral": TinyModel("mistral", {**COMMON, "sliding_window": WINDOW}, windowed=(0, 1)),
    "gemma2": TinyModel(
        "gemma2",
        {
            **COMMON, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "initializer_range": 0.2,
        },
        post_norm=-0.7,
        windowed=(0,),
    ),
    "gemma3": TinyModel(
        "gemma3_text",
        {
            **COMMON, "sliding_window": WINDOW, "num_hidden_layers": 3, "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "initializer_range": 0.1,
        },
        post_norm=-0.7,
        windowed=(0, 1),
    ),
    "phi3": TinyModel("phi3", COMMON),
    "mixtral": TinyModel("mixtral", {**COMMON, "num_local_experts": 12}),  # whose order by text is not by number
    "gpt-oss": TinyModel(
        "gpt_oss",
        {
            **COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
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
    "bart": TinyModel(  # counts positions by itself, into a table
        "bart",
        {
            "vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.05, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 2,
        },
    ),
    "roberta": TinyModel(  # the table of positions begins with a row for padding
        "roberta", {**COMMON, "is_decoder": True, "type_vocab_size": 2},
    ),
    "roformer": TinyModel(  # rotates by a table that it counts into
        "roformer", {**COMMON, "embedding_size": 32, "is_decoder": True},
    ),
    "gpt-neo": TinyModel(  # cuts its masks, of which one has a window, out of a stored one
        "gpt_neo",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": WINDOW,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256, "initializer_range": 0.05,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "inkling": TinyModel(  # biases by distances that it counts; convolutions of keys, values and blocks
        "inkling_text",
        {
            **COMMON, "sliding_window_size": WINDOW, "swa_head_dim": 8, "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2, "layer_types": ["hybrid_sliding", "hybrid"], "moe_intermediate_size": 48,
            "mlp_layer_types": ["sparse", "sparse"], "n_routed_experts": 8, "num_experts_per_tok": 2,
        },
        windowed=(0,),
    ),
    "mamba": TinyModel(  # states only: no attention
        "mamba",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4,
            "initializer_range": 0.05, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "falcon-h1": TinyModel(  # attention and a state-space model in one layer
        "falcon_h1",
        {
            **COMMON, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2,
            "mamba_d_state": 8, "mamba_chunk_size": 4, "time_step_limit": (0.1, 0.3),
        },
    ),
    "qwen3-next": TinyModel(  # a gated delta rule and full attention in turn
        "qwen3_next",
        {
            **COMMON, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        },
    ),
    "deepseek-v32": TinyModel(  # an indexer chooses the keys that a query sees
        "deepseek_v32",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
            "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "max_position_embeddings": 256, "initializer_range": 0.05, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "index_head_dim": 16, "index_n_heads": 16, "index_topk": 8,
        },
    ),
    "gemma3n": TinyModel(  # the last layers use the keys and values of earlier ones
        "gemma3n_text",
        {
            **COMMON, "sliding_window": WINDOW, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB, "laurel_rank": 8, "initializer_range": 0.1,
        },
        post_norm=-0.7,
        windowed=(0,),
    ),
}  # fmt: skip


def build(name: str, seed: int = 0, **changes: Any) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The model called `name`, float32, seeded; `changes` are made to its configuration."""
    return build_of(MODELS[name], seed, **changes)


def build_of(tiny: TinyModel, seed: int = 0, **changes: Any) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """See `build`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

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
