"""Which keyword arguments of `from_pretrained` are understood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from qeff_ir.errors import CompileError, ModelLoadError
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.reading import path_of

_HUB = frozenset({"revision", "cache_dir", "token", "local_files_only"})
_ANYWAY: dict[str, tuple[Any, ...]] = {
    # of the incumbent, see also `qeff_ir.auto.qaic_config`
    "continuous_batching": (False, None),
    "full_batch_size": (None,),
    "layerwise": (False, None),
    "max_seq_len_cached": (None,),
    "qaic_config": (None,),
    "kv_offload": (None, False),
    # of transformers
    "adapter_kwargs": (None,),
    "attn_implementation": ("eager", "sdpa", None),
    "config": (None,),
    "device_map": ("cpu", {"": "cpu"}, None),
    "dtype": ("float32", "auto", None),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm", None),
    "force_download": (False, None),
    "generation_config": (None,),
    "gguf_file": (None,),
    "ignore_mismatched_sizes": (False,),
    "key_mapping": (None,),
    "low_cpu_mem_usage": (True, False, None),
    "max_memory": (None,),
    "offload_folder": (None,),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "output_loading_info": (False,),
    "proxies": (None,),
    "quantization_config": (None,),
    "return_dict": (True, None),
    "state_dict": (None,),
    "subfolder": ("", None),
    "torch_dtype": ("float32", "auto", None),
    "use_cache": (True, None),
    "use_safetensors": (True, None),
    "variant": (None,),
    "weights_only": (True,),
}
"""Arguments with the values that ask for what happens here anyway."""


def model_name(value: object) -> str | Path:
    """A model folder or hub id that a caller has given.

    Raises:
        ModelLoadError: It is neither.
    """
    path_of(value, "the model", ModelLoadError)
    return value if isinstance(value, str) else Path(str(value))


def check_compile_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of ``compile`` of the wrong type before anything is done; those that are options are not here.

    Raises:
        CompileError: One has another type than its documentation says.
    """
    for name, value in arguments.items():
        if name == "emit_only":
            fits, wanted = isinstance(value, bool), "True or False"
        elif name == "watch":
            fits, wanted = value is None or callable(value), "a function"
        elif name == "token_embedding":
            fits, wanted = value in ("graph", "host") if isinstance(value, str) else False, "'graph' or 'host'"
        elif name == "target":
            fits, wanted = isinstance(value, str), "a text"
        elif name == "pipeline":
            fits = all(one is None or isinstance(one, str | Pipeline) for one in _each(value))
            wanted = "a text or a Pipeline, or one for each program by name"
        else:
            continue
        if not fits:
            raise CompileError(f"{name} is {value!r}: give {wanted}")


def _each(pipeline: Any) -> list[Any]:
    """All pipelines that a caller gives."""
    return list(cast("Mapping[str, Any]", pipeline).values()) if isinstance(pipeline, Mapping) else [pipeline]


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that are for the hub; those that ask for what happens anyway are dropped.

    Raises:
        ModelLoadError: One asks for something else.
    """
    for name, value in kwargs.items():
        if name not in _HUB and _plain(value) not in map(_plain, _ANYWAY.get(name, ())):
            raise ModelLoadError(f"from_pretrained does not support {name}={value!r}: leave it out")
    return {k: v for k, v in kwargs.items() if k in _HUB}


def _plain(value: Any) -> str:
    """A value as text: of torch's types and devices, their names."""
    return str(value).removeprefix("torch.")
