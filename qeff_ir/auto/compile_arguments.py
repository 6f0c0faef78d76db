"""Arguments of the incumbent's ``compile`` that are not flags of a compiler (AI 100 contract §4.6 and §4.7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_ir.errors import CompileError

_ANY = object()
_KNOWN: dict[str, tuple[tuple[Any, ...], str]] = {
    # how the incumbent exports; the result is the same here
    "dynamo": ((_ANY,), ""),
    "layerwise": ((_ANY,), ""),
    "layerwise_window_size": ((_ANY,), ""),
    "offload_pt_weights": ((_ANY,), ""),
    "use_onnx_subfunctions": ((False, None), "layers as functions (sub_functions=True does)"),
    "onnx_path": ((None,), "a graph of another exporter"),
    # what a compiled model cannot do yet
    "enable_chunking": ((False, None), "prefill on devices of its own"),
    "moe_prefill_packed_chunk_size": ((256, None), "packed prefill of experts"),
    "qaic_config": ((None,), "settings of the incumbent's causal LMs"),  # those read it before
}
"""Each argument with the values that ask for what happens anyway, and what any other value asks for."""

_DEFAULTS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "comp_ctx_lengths_decode",
        "comp_ctx_lengths_prefill",
        "enable_qnn",
        "full_batch_size",
        "kv_cache_batch_size",
        "kv_cache_prefix",
        "num_speculative_tokens",
        "prefill_only",
        "retain_full_kv",
    ),
    (None,),
)
"""Arguments that are a target's options here, with the values that ask for nothing there."""

_ADAPTED, _PICTURED = "QEffAutoPeftModelForCausalLM", "QEFFAutoModelForImageTextToText"
_OF_OTHERS: dict[str, str] = {
    **dict.fromkeys(
        ("adapter_slots", "bake_adapters", "lora_bias", "lora_mode", "lora_targets", "max_lora_rank"), _ADAPTED
    ),
    **dict.fromkeys(("image_size", "num_frames", "num_images"), _PICTURED),
    "encoder_ctx_len": "QEFFAutoModelForSeq2SeqLM",
}
"""Options of other kinds of models, with the class that takes them."""


def compiler_flags(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``compile`` that are flags of the target's compiler; those that change nothing are dropped.

    Raises:
        CompileError: One asks for something that a compiled model cannot do.
    """
    flags: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in _OF_OTHERS:
            if value is not None and value is not False:
                what = _OF_OTHERS[name]
                raise CompileError(f"{name} is an option of {what}: open the model as one, or leave {name} out")
            continue
        if name not in _KNOWN:
            if not any(value is item for item in _DEFAULTS.get(name, ())):
                flags[name] = value
            continue
        anyway, what = _KNOWN[name]
        if _ANY not in anyway and not asks_for_nothing(value, anyway):
            raise CompileError(f"{name}={value!r} asks for {what}, which is not supported: leave {name} out")
    return flags


def asks_for_nothing(value: Any, anyway: tuple[Any, ...]) -> bool:
    """Whether a value is one of those that ask for what happens anyway; `False` and 0 are two."""
    return any(value is item or (item == value and type(item) is type(value) is int) for item in anyway)
