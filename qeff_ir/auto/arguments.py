"""Which keyword arguments of `from_pretrained` are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_ir.errors import ModelLoadError

_HUB = frozenset({"revision", "cache_dir", "token", "local_files_only"})
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "attn_implementation": ("eager", "sdpa", None),
    "continuous_batching": (False, None),
    "qaic_config": (None,),
    "kv_offload": (None, False),
    "dtype": ("float32", "auto", None),
    "torch_dtype": ("float32", "auto", None),
}
"""Arguments of the incumbent's `from_pretrained`, with the values that ask for what happens here anyway."""


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that are for the hub; those that ask for what happens anyway are dropped.

    Raises:
        ModelLoadError: One asks for something else.
    """
    for name, value in kwargs.items():
        if name not in _HUB and str(value).removeprefix("torch.") not in map(str, _DEFAULTS.get(name, ())):
            raise ModelLoadError(f"from_pretrained does not support {name}={value!r}: leave it out")
    return {k: v for k, v in kwargs.items() if k in _HUB}
