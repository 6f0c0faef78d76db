"""A model of `benchmarks.shapes` as a GGUF file, which llama.cpp reads: the same weights, in a form of GGUF's.

Names and metadata are those of GGUF's "llama" graph; its rotation takes neighbors for a pair, so the rows of queries
and keys are put in that order. The tokenizer is made up: a race gives tokens.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from qeff_ir.arrays import Array

_TABLES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NORMAL = 1
"""GGUF's kind of a token that is a piece of text."""
WORD = "w"
"""What the text of a token begins with; its number follows."""


def write_gguf(model: PreTrainedModel, file: Path, form: str) -> None:
    """Write a model; vectors stay float32.

    Args:
        model: A decoder of `benchmarks.shapes`.
        file: To write.
        form: Of the matrices, by GGUF's name: ``F32``, ``BF16``, ``Q8_0``, ``Q4_0``.
    """
    gguf: Any = importlib.import_module("gguf")
    config: Any = model.config
    kind = gguf.GGMLQuantizationType[form]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        path, array = name.removesuffix(".weight"), parameter.detach().numpy()
        own = path.rpartition(".")[2]
        array = _neighbors(array, heads[own]) if own in heads else array
        if array.ndim == 1:
            writer.add_tensor(_name(path), array)
        else:
            writer.add_tensor(_name(path), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(path: str) -> str:
    if path in _TABLES:
        return f"{_TABLES[path]}.weight"
    _, _, layer, own = path.split(".", 3)
    return f"blk.{layer}.{_LAYER[own]}.weight"


def _neighbors(rows: Array, heads: int) -> Array:
    """Rows of a projection, ``[heads * width, in]``, with the two numbers of a rotated pair side by side."""
    width = rows.shape[0] // heads
    return np.ascontiguousarray(rows.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(rows.shape))


def _add_tokenizer(writer: Any, size: int) -> None:
    """Words that tell their numbers, for llama.cpp's server answers with text."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"{WORD}{index}" for index in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([_NORMAL] * size)
