"""Tiny random multimodal models, as data: a configuration, and what a processor would make of one picture.

As in `tests.models`, weights, biases and scales are drawn so that whatever is dropped shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCAB, IMAGE, VIDEO = 99, 90, 91
"""Tokens, and those that stand for a row of a picture and of a video."""


@dataclass(frozen=True)
class TinyMultimodal:
    """A configuration of a tiny model.

    Attributes:
        model_type: transformers' name of the architecture.
        config: What differs from the architecture's defaults.
        picture: Name and shape of what the encoder takes for one picture; whole numbers are given as they are.
        rows: Rows that it makes of one.
        planes: Whether tokens have places on several axes.
        types: Name of the input that says which tokens see later ones, if any do.
        kind: The type of the tokens of a picture.
        whole: Whether a prompt must lie in one run.
        post_norm: As in `tests.models.TinyModel`.
    """

    model_type: str
    config: dict[str, Any]
    picture: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: int = 0
    planes: bool = False
    types: str | None = None
    kind: int = 1
    whole: bool = False
    post_norm: float = 0.0


TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.05,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "projection_dim": 32,
}  # fmt: skip
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
GRID: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 16,
    "fullatt_block_indexes": [1], "in_channels": 3, "in_chans": 3,
}  # fmt: skip
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TOKENS = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO,
    "vision_start_token_id": 92, "vision_end_token_id": 93, "boi_token_index": 92, "eoi_token_index": 93,
}  # fmt: skip


def both(kind: str, vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A configuration of two parts."""
    rotary = {"rope_parameters": _ROTARY} if "vl_text" in kind else {}
    own = {"model_type": kind, **TEXT, **rotary, **(text or {})}
    return {"text_config": own, "vision_config": vision, **_TOKENS, **more}


MODELS: dict[str, TinyMultimodal] = {
    "llava": TinyMultimodal("llava", both("llama", CLIP), {"pixel_values": (1, 3, 16, 16)}, 16),
    "llava_next": TinyMultimodal(
        "llava_next",
        both("llama", CLIP, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]),
        {"pixel_values": (1, 5, 3, 16, 16), "image_sizes": [[25, 32]]},
        70,
    ),
    "gemma3": TinyMultimodal(
        "gemma3",
        both(
            "gemma3_text", SIGLIP, mm_tokens_per_image=4,
            text={"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        {"pixel_values": (1, 3, 16, 16)},
        4,
        types="token_type_ids",
        post_norm=-0.7,
    ),
    "paligemma": TinyMultimodal(
        "paligemma",
        both("gemma", SIGLIP, projection_dim=32),
        {"pixel_values": (1, 3, 16, 16)},
        16,
        types="token_type_ids",
        kind=0,  # of all tokens of a prompt
        whole=True,
    ),
    "qwen2_5_vl": TinyMultimodal(
        "qwen2_5_vl",
        both("qwen2_5_vl_text", GRID),
        {"pixel_values": (24, 96), "image_grid_thw": [[1, 6, 4]]},
        6,  # in two windows, one smaller than the other
        planes=True,
    ),
    "qwen3_vl": TinyMultimodal(
        "qwen3_vl",
        both(
            "qwen3_vl_text",
            {**GRID, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        ),
        {"pixel_values": (32, 96), "image_grid_thw": [[1, 8, 4]]},
        8,
        planes=True,
    ),
    "idefics3": TinyMultimodal(
        "idefics3",
        both(
            "llama",
            {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 16, "patch_size": 4,
            },
            scale_factor=2,
        ),
        {"pixel_values": (1, 2, 3, 16, 16), "pixel_attention_mask": "ones (1, 2, 16, 16)"},
        8,
    ),
}  # fmt: skip


@functools.cache
def speaking() -> Any:
    """A model that also speaks; the part that answers in text takes the pictures of ``qwen2_5_vl``."""
    import torch
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    case = MODELS["qwen2_5_vl"].config
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 32}
    parts = {key: {k: v for k, v in case[key].items() if k != "model_type"} for key in ("text_config", "vision_config")}
    parts["text_config"]["initializer_range"] = 0.3
    torch.manual_seed(0)
    config = Qwen2_5OmniConfig(thinker_config={**case, **parts, "audio_config": audio}, enable_audio_output=False)
    return Qwen2_5OmniForConditionalGeneration(config).eval()


def _drawn(name: str, shape: Any, seed: int) -> torch.Tensor:
    import torch

    if isinstance(shape, str):
        return torch.ones(eval(shape.removeprefix("ones ")), dtype=torch.long)  # our own data
    if isinstance(shape, list):
        return torch.tensor(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(name: str, seed: int = 5) -> dict[str, torch.Tensor]:
    """What the processor of a tiny model would make of one picture."""
    return {key: _drawn(key, shape, seed) for key, shape in MODELS[name].picture.items()}


@functools.cache
def tiny(name: str) -> PreTrainedModel:
    """A tiny model; do not change it."""
    return build(name)


@functools.cache
def lively(name: str) -> PreTrainedModel:
    """A tiny model whose answers change from token to token, and with the picture; do not change it."""
    return build(name, initializer_range=0.3, post_norm=0.0)


def build(name: str, initializer_range: float = 0.05, post_norm: float | None = None) -> PreTrainedModel:
    """A tiny model of one's own."""
    return of_case(MODELS[name], initializer_range, post_norm)


def of_case(case: TinyMultimodal, initializer_range: float, post_norm: float | None = None) -> PreTrainedModel:
    """A tiny model of a configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    text = {**case.config["text_config"], "initializer_range": initializer_range}
    config = AutoConfig.for_model(case.model_type, **{**case.config, "text_config": text})
    make: Callable[..., Any] = AutoModelForImageTextToText.from_config
    model = make(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "post_" in key and "language_model" in key:
                parameter.add_(case.post_norm if post_norm is None else post_norm)
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() > 2 or not parameter.any():  # patches that outweigh what is added to them
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
