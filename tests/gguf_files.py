"""Tiny GGUF files, written by the package ``gguf`` as llama.cpp's converter writes them; the reader's own oracle reads
them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedConfig, PreTrainedModel

from qeff_ir.arrays import Array
from tests.models import COMMON, TinyModel, build_of

LAYERS = 2
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}
"""transformers' names, and llama.cpp's."""

SCALES = {
    Kind.Q4_K: {0: 8e-5, 2: 6e-4},
    Kind.Q5_K: {0: 4e-5, 2: 6e-4},
    Kind.Q6_K: {208: 1.5e-5},
}
"""The scales of a block by where they lie in it, for numbers of the size of a weight, whose mean is 0."""


def write(
    path: Path,
    config: PreTrainedConfig,
    model: PreTrainedModel,
    kind: Kind = Kind.F32,
    *,
    kinds: Mapping[str, Kind] | None = None,
    change: Callable[[dict[str, Array]], None] | None = None,
    tokens: bool = False,
) -> Path:
    """Write a model; matrices get a type, and what `kinds` names another one (by llama.cpp's name of a tensor)."""
    found: Any = config
    architecture = ARCHITECTURES[found.model_type]
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name("tiny")
    writer.add_context_length(found.max_position_embeddings)
    writer.add_embedding_length(found.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(found.intermediate_size)
    writer.add_head_count(found.num_attention_heads)
    writer.add_head_count_kv(found.num_key_value_heads)
    writer.add_layer_norm_rms_eps(found.rms_norm_eps)
    writer.add_rope_freq_base(found.rope_parameters["rope_theta"])
    writer.add_vocab_size(found.vocab_size)
    head = (
        found.hidden_size // found.num_attention_heads if getattr(found, "head_dim", None) is None else found.head_dim
    )
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    if hasattr(found, "num_experts"):
        writer.add_expert_count(found.num_experts)
        writer.add_expert_used_count(found.num_experts_per_tok)
        writer.add_expert_feed_forward_length(found.moe_intermediate_size)
    if tokens:
        _vocabulary(writer, found.vocab_size)
    tensors: dict[str, Array] = {}
    for own, tensor in model.state_dict().items():
        for name, numbers in _as_llama_cpp(own, tensor.detach().float().numpy(), found, names):
            tensors[name] = np.ascontiguousarray(numbers)
    if change is not None:
        change(tensors)
    for name, numbers in tensors.items():
        own_kind = (kinds or {}).get(name, kind if numbers.ndim > 1 else Kind.F32)
        writer.add_tensor(name, blocks(numbers, own_kind), raw_dtype=own_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(numbers: Array, kind: Kind) -> Array:
    """Numbers in a type; those that the package does not write (K-quants) are made of random codes of their scale."""
    try:
        return gguf.quantize(numbers, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(int((numbers > 0).sum()))  # another one for each tensor
        made = rng.integers(0, 256, (*numbers.shape[:-1], numbers.shape[-1] // block, size), np.uint8)
        for at, scale in SCALES[kind].items():
            made[..., at : at + 2] = np.array([scale * 25 * np.abs(numbers).mean()], np.float16).view(np.uint8)
        return made.reshape(*numbers.shape[:-1], -1)


def _as_llama_cpp(own: str, numbers: Array, config: Any, names: gguf.TensorNameMap) -> list[tuple[str, Array]]:
    """The tensors of llama.cpp that a parameter becomes."""
    experts = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", own)
    if experts is not None:
        layer, which = experts.groups()
        if which == "down_proj":
            return [(f"blk.{layer}.ffn_down_exps.weight", numbers)]
        halves = zip(("gate", "up"), np.split(numbers, 2, axis=1), strict=True)
        return [(f"blk.{layer}.ffn_{half}_exps.weight", part) for half, part in halves]
    if own == "lm_head.weight" and config.tie_word_embeddings:
        return []
    if config.model_type == "llama" and re.search(r"self_attn\.[qk]_proj", own):
        heads = config.num_attention_heads if "q_proj" in own else config.num_key_value_heads
        numbers = numbers.reshape(heads, 2, -1, *numbers.shape[1:]).swapaxes(1, 2).reshape(numbers.shape)
    name = names.get_name(own, try_suffixes=(".weight", ".bias"))
    assert name is not None, own
    return [(name, numbers)]


def _vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*["<unk>", "<s>", "</s>", "Ġ", *letters][: size - 1], "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (size - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def tiny(name: str) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """A tiny model of one of `ARCHITECTURES`; of llama, rows of two matrices hold a whole block of the largest type."""
    wide = {"intermediate_size": 256, "head_dim": 64}
    # transformers does not read the width of an expert, and takes its default.
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
    return build_of(TinyModel(name, {**COMMON, **{"llama": wide, "qwen3_moe": experts}.get(name, {})}))
