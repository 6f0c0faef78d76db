"""Tiny random models without a cache, as data: text, vision and audio encoders, and decoders used as embedders.

As in `tests.models`, weights, biases and scales are drawn so that whatever is dropped shows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCAB = 97
TOKENS = 11
"""Length of the longer of the two texts."""


@dataclass(frozen=True)
class TinyEncoder:
    """A configuration of a tiny model.

    Attributes:
        kind: ``text``, ``vision`` or ``audio``.
        model_type: transformers' name of the architecture.
        config: What differs from the architecture's defaults.
        auto: transformers' auto class.
        samples: Length of a recording, where the model takes samples or frames.
    """

    kind: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    auto: str = "AutoModel"
    samples: int = 0


_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.05, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "num_channels": 3, "initializer_range": 0.05,
}  # fmt: skip
_AUDIO: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32,
    "conv_dim": [16, 16], "conv_kernel": [10, 4], "conv_stride": [5, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "initializer_range": 0.05,
}  # fmt: skip

ENCODERS: dict[str, TinyEncoder] = {
    "bert": TinyEncoder("text", "bert", _TEXT),
    "roberta": TinyEncoder("text", "roberta", _TEXT),
    "xlm-roberta": TinyEncoder("text", "xlm-roberta", _TEXT),
    "distilbert": TinyEncoder(
        "text", "distilbert",
        {
            "vocab_size": VOCAB, "dim": 32, "n_heads": 4, "n_layers": 1, "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "albert": TinyEncoder("text", "albert", {**_TEXT, "embedding_size": 16}),
    "electra": TinyEncoder("text", "electra", {**_TEXT, "embedding_size": 16}),
    "mpnet": TinyEncoder("text", "mpnet", {**_TEXT, "pad_token_id": 1}),
    "deberta-v2": TinyEncoder(
        "text", "deberta-v2",
        {
            **_TEXT, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
        },
    ),
    "modernbert": TinyEncoder(
        "text", "modernbert",
        {
            **_TEXT, "num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 6,
        },
    ),
    "t5": TinyEncoder("text", "t5", _T5),
    "roformer": TinyEncoder("text", "roformer", _TEXT),
    "esm": TinyEncoder("text", "esm", {**_TEXT, "position_embedding_type": "rotary", "mask_token_id": 5}),
    "nomic_bert": TinyEncoder("text", "nomic_bert", _TEXT),
    "bart": TinyEncoder(
        "text", "bart",
        {
            "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "qwen3": TinyEncoder("text", "qwen3", _DECODER),
    "gpt2": TinyEncoder(
        "text", "gpt2",
        {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64,
        },
    ),
    "clip-text": TinyEncoder("text", "clip_text_model", {**_TEXT, "projection_dim": 16}),
    "vit": TinyEncoder("vision", "vit", _IMAGE),
    "dinov2": TinyEncoder("vision", "dinov2", {**_IMAGE, "mlp_ratio": 2}),
    "dinov3": TinyEncoder("vision", "dinov3_vit", {**_IMAGE, "num_register_tokens": 2}),
    "siglip": TinyEncoder("vision", "siglip_vision_model", _IMAGE),
    "clip-vision": TinyEncoder("vision", "clip_vision_model", {**_IMAGE, "projection_dim": 16}),
    "convnext": TinyEncoder(
        "vision", "convnext",
        {
            "image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2,
        },
    ),
    "resnet": TinyEncoder(
        "vision", "resnet",
        {
            "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32,
        },
    ),
    "whisper": TinyEncoder(
        "audio", "whisper",
        {
            "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": TinyEncoder("audio", "wav2vec2", _AUDIO, "AutoModelForCTC", samples=401),
    "ast": TinyEncoder(
        "audio", "audio-spectrogram-transformer",
        {
            **_IMAGE, "max_length": 24, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 4, "time_stride": 4,
        },
    ),
    "wav2vec2-bert": TinyEncoder(
        "audio", "wav2vec2-bert",
        {
            **_AUDIO, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 5, "add_adapter": False,
        },
        samples=29,
    ),
}  # fmt: skip


@functools.cache
def build(name: str) -> PreTrainedModel:
    """The model called `name`, float32, seeded; do not change it."""
    import torch
    import transformers

    tiny = ENCODERS[name]
    config = transformers.AutoConfig.for_model(tiny.model_type, **tiny.config)
    torch.manual_seed(0)
    model = getattr(transformers, tiny.auto).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return model


def example(name: str, shapes: dict[str, tuple[int | str, ...]]) -> dict[str, torch.Tensor]:
    """A batch of two for inputs of these shapes; the second text is shorter, padded on the right."""
    import torch

    tiny = ENCODERS[name]
    generator = torch.Generator().manual_seed(1)
    sizes = {"batch_size": 2, "seq_len": tiny.samples or TOKENS}
    made: dict[str, torch.Tensor] = {}
    for key, shape in shapes.items():
        dims = [sizes[d] if isinstance(d, str) else d for d in shape]
        if key == "attention_mask":
            made[key] = torch.ones(dims, dtype=torch.int64)
            made[key][1, -4:] = 0
        elif key == "input_ids":
            made[key] = torch.randint(6, VOCAB, dims, generator=generator)
        else:
            made[key] = torch.randn(dims, generator=generator)
    if "attention_mask" in made and "input_ids" in made:
        pad = tiny.config.get("pad_token_id", 0)
        made["input_ids"] = torch.where(made["attention_mask"] == 0, pad, made["input_ids"])
    return made
