"""Further tiny models of pictures and text with transformers' own processors and a chat template, as data.

All pictures of `SIZES` go through the image processor of each; what it makes of them differs in most families.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tests import multimodal
from tests.multimodal import CLIP, GRID, MODELS, SIGLIP, TinyMultimodal, both
from tests.processors import PROCESSORS, TinyProcessor, made

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = [(16, 16), (24, 16), (16, 32), (32, 32), (40, 20)]
"""Heights and widths of pictures."""

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE w60 {% else %}w61 {{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w62{% endif %}"
)
"""A chat template; words around pictures and text show that it was applied."""

_SPLIT: dict[str, Any] = {
    "crop_to_patches": True, "min_patches": 1, "max_patches": 2, "size": {"height": 16, "width": 16}
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip

_MORE: dict[str, tuple[TinyMultimodal, TinyProcessor]] = {
    "vipllava": (
        TinyMultimodal("vipllava", both("llama", CLIP, vision_feature_layers=[-1, -2], projector_layernorm_eps=1e-5)),
        PROCESSORS["llava"],
    ),
    "idefics2": (
        TinyMultimodal(
            "idefics2",
            both(
                "mistral", _SMALL,
                perceiver_config={
                    "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
                    "resampler_head_dim": 8, "num_key_value_heads": 2,
                },
            ),
        ),
        TinyProcessor(
            "Idefics2Processor", "Idefics2ImageProcessorPil",
            {"size": {"shortest_edge": 8, "longest_edge": 16}, "do_image_splitting": False}, {"image_seq_len": 4},
            special={"image_boundary_token": "<fake_token_around_image>"},
        ),
    ),
    "deepseek_vl": (
        TinyMultimodal("deepseek_vl", both("llama", {**SIGLIP, "vision_use_head": False})),
        TinyProcessor(
            "DeepseekVLProcessor", "DeepseekVLImageProcessorPil",
            {"size": {"height": 16, "width": 16}, "min_size": 4}, {"num_image_tokens": 16},
        ),
    ),
    "aya_vision": (
        TinyMultimodal(
            "aya_vision",
            both("cohere2", SIGLIP, downsample_factor=2, adapter_layer_norm_eps=1e-5, vision_feature_layer=-1),
        ),
        TinyProcessor(
            "AyaVisionProcessor", "GotOcr2ImageProcessorPil", _SPLIT,
            {
                "patch_size": 4, "img_size": 16, "downsample_factor": 2, "start_of_img_token": "<boi>",
                "end_of_img_token": "<eoi>", "img_patch_token": "<image>", "tile_token": "w70",
                "tile_global_token": "w71", "img_line_break_token": "w72",
            },
        ),
    ),
    "paligemma": (
        TinyMultimodal("paligemma", both("gemma", {**SIGLIP, "projection_dim": 32}, projection_dim=32)),
        TinyProcessor(
            "PaliGemmaProcessor", "SiglipImageProcessorPil",
            {"size": {"height": 16, "width": 16}, "image_seq_length": 16},
        ),
    ),
    "qwen2_vl": (
        TinyMultimodal("qwen2_vl", both("qwen2_vl_text", {**GRID, "hidden_size": 32, "mlp_ratio": 2}), planes=True),
        TinyProcessor("", "Qwen2VLImageProcessorPil", PROCESSORS["qwen2_5_vl"].sizes),
    ),
}  # fmt: skip

FAMILIES = {name: (MODELS[name], PROCESSORS[name]) for name in PROCESSORS} | _MORE
"""A model and its processor by the name of the family."""


@functools.cache
def lively(name: str) -> PreTrainedModel:
    """A tiny model whose answers change from token to token, and with the picture; do not change it."""
    return multimodal.of_case(FAMILIES[name][0], 0.3, 0.0)


@functools.cache
def processor(name: str) -> Any:
    """Its processor, with a chat template."""
    case = FAMILIES[name][1]
    found = made(case)
    found.chat_template = TEMPLATE.replace("PLACE", case.place)
    return found
