"""What the incumbent is told when it opens a model, ``continuous_batching`` and ``qaic_config``: options of `compile`.

The AI 100 contract has the names (§1.3, §3, §14.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from qeff_ir.auto.compile_arguments import asks_for_nothing
from qeff_ir.errors import CompileError
from qeff_ir.passing.options import nearest

OPTIONS = {"ccl_enabled": "ccl_enabled"}
"""Keys that are options of `compile`, by their names there."""

_NEEDS = {
    "speculative_model_type": ("num_speculative_tokens", "target"),
}
"""Keys that another argument of `compile` answers, with the only value that is known."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "enable_blocking": ((False, None), "attention in blocks"),
    "include_sampler": ((False, None), "sampling on the device"),
    "mla_absorption": ((None,), "caches of another form than the model's"),
    "pretrained_model_name_or_path": ((None,), "the heads of another model"),
    "replicate_kv_heads": ((False, None), "copied key and value heads"),
}
"""Keys with the values that ask for what happens anyway, and what any other value asks for."""

_OF = {
    "blocking_mode": "enable_blocking",
    "head_block_size": "enable_blocking",
    "include_guided_decoding": "include_sampler",
    "max_top_k_ids": "include_sampler",
    "num_batch_blocks": "enable_blocking",
    "num_kv_blocks": "enable_blocking",
    "num_q_blocks": "enable_blocking",
    "return_pdfs": "include_sampler",
    "skip_kv": "enable_blocking",
}
"""Settings of another key, which mean nothing without it."""


def loaded(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `from_pretrained` without the incumbent's, and what those ask of `compile`."""
    rest = dict(arguments)
    asked = {name: rest.pop(name) for name in ("continuous_batching", "qaic_config") if name in rest}
    return rest, {name: value for name, value in asked.items() if value not in (None, False)}


def compile_options(asked: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a model that was opened so is compiled with.

    Args:
        asked: ``continuous_batching`` and ``qaic_config``, see `loaded`.
        given: The arguments of `compile`, which may have a ``qaic_config`` too.

    Raises:
        CompileError: One asks for something that a compiled model cannot do, or for an argument that is not given.
    """
    if asked.get("continuous_batching") and given.get("full_batch_size") is None:
        raise CompileError("continuous_batching=True needs the rows of the caches: give compile(full_batch_size=...)")
    rest, found = dict(given), dict[str, Any]()
    for config in (asked.get("qaic_config"), rest.pop("qaic_config", None)):
        if config is not None and not isinstance(config, Mapping):
            raise CompileError(f"qaic_config is {config!r}: give its settings by name")
        for name, value in cast("Mapping[str, Any]", config or {}).items():
            found |= _read(str(name), value, rest)
    return {**found, **rest}


def _read(name: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """One setting as options.

    Raises:
        CompileError: See `compile_options`.
    """
    if name in OPTIONS:
        return {} if value is None else {OPTIONS[name]: value}
    if name in _OF:
        return {}
    if name in _NEEDS:
        needed, only = _NEEDS[name]
        if value is not None and value != only:
            raise CompileError(f"qaic_config has {name}={value!r}, which is not supported: give {only!r}")
        if value is not None and given.get(needed) is None:
            raise CompileError(f"qaic_config has {name}={value!r}, and compile has no {needed}: give it")
        return {}
    if name not in _REFUSED:
        known = (*OPTIONS, *_NEEDS, *_REFUSED, *_OF)
        raise CompileError(f"qaic_config has the unknown setting '{name}'; {nearest(name, known)}")
    anyway, what = _REFUSED[name]
    if not asks_for_nothing(value, anyway):
        raise CompileError(f"qaic_config has {name}={value!r}, which asks for {what}: leave {name} out")
    return {}
