"""What transformers has renamed between the versions that are supported: asked of what is installed, not of its number.

Before transformers 5.24, models call the cache that they take and return ``past_key_values`` (some ``cache_params``);
since then, ``cache``. A model whose code is not transformers' own may use a name of before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qeff_ir.errors import UnsupportedModelError

_NAMES = ("cache", "past_key_values", "cache_params")

CACHE: str = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in _NAMES)
"""What the installed transformers' own models call the cache."""


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a forward pass calls the cache that it takes; `CACHE` where its signature does not tell."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in (CACHE, *_NAMES) if name in parameters), CACHE)


def next_cache(model: PreTrainedModel, out: Any) -> dict[str, Any]:
    """The keyword argument that hands the cache of one run on to the next.

    Args:
        model: The model.
        out: What it returned.

    Raises:
        UnsupportedModelError: It returned no cache.
    """
    found = (getattr(out, name, None) for name in (CACHE, *_NAMES))
    cache = next((value for value in found if value is not None), None)
    if cache is None:
        raise UnsupportedModelError(f"{type(model).__name__} returns no cache, so a second run cannot go on from it")
    return {cache_argument(model.forward): cache}
