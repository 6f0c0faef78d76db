"""What the incumbent is told when it opens a model, ``continuous_batching`` and ``qaic_config``: options of `compile`.

The AI 100 contract has the names (§1.3, §3, §14.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from qeff_ir.auto.compile_arguments import asks_for_nothing
from qeff_ir.errors import CompileError
from qeff_ir.passing.options import as_text, nearest

OPTIONS = {"ccl_enabled": "ccl_enabled"}
"""Keys that are options of `compile`, by their names there."""

_NEEDS = {
    "speculative_model_type": ("num_speculative_tokens", "target"),
}
"""Keys that another argument of `compile` answers, with the only value that is known."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "mla_absorption": ((None,), "caches of another form than the model's"),
    "num_batch_blocks": ((None,), "attention in blocks of rows"),
    "pretrained_model_name_or_path": ((None,), "the heads of another model"),
}
"""Keys with the values that ask for what happens anyway, and what any other value asks for."""

_PASSES: dict[str, tuple[str, str, dict[str, str]]] = {
    "include_sampler": (
        "sampling",
        "",
        {"return_pdfs": "pdfs", "max_top_k_ids": "top", "include_guided_decoding": "guided"},
    ),
    "replicate_kv_heads": ("replicate-kv-heads", "<kv-retention", {}),
    "enable_blocking": (
        "blocked-attention",
        "<attention",
        {
            "blocking_mode": "mode",
            "num_kv_blocks": "num-kv-blocks",
            "num_q_blocks": "num-q-blocks",
            "head_block_size": "head-block-size",
        },
    ),
}
"""Keys that ask for a pass, its place in a pipeline, and the keys that are its options: these mean nothing alone."""

_ANYWAY = ("skip_kv",)
"""Keys that ask for nothing: slots without a token are not read anyway."""


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
    rest, found = {name: value for name, value in given.items() if name != "qaic_config"}, dict[str, Any]()
    for name, value in _settings(asked, given).items():
        found |= _read(name, value, rest)
    return {**found, **rest}


def pipeline_edits(asked: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The passes that the settings ask for, as edits of a pipeline; arguments as for `compile_options`.

    Raises:
        CompileError: A setting is no number, text or truth value.
    """
    config, edits = _settings(asked, given), list[str]()
    for key, (name, place, options) in _PASSES.items():
        wanted = config.get(key)
        if asks_for_nothing(wanted, (False, None)):
            continue
        own = [] if wanted is True else [("n", wanted)]
        own += [(option, config[k]) for k, option in options.items() if config.get(k) is not None]
        if not all(isinstance(value, str | int) for _, value in own) or (options and wanted is not True):
            raise CompileError(f"qaic_config has {key}={wanted!r} with {dict(own)}: give numbers, texts, True or False")
        written = " ".join(f"{option}={as_text(value)}" for option, value in own)
        edits.append(f"+{name}{f'{{{written}}}' if written else ''}{place}")
    return ",".join(edits)


def _settings(asked: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings by name; those of `compile` come last.

    Raises:
        CompileError: They are no mapping.
    """
    found: dict[str, Any] = {}
    for config in (asked.get("qaic_config"), given.get("qaic_config")):
        if config is not None and not isinstance(config, Mapping):
            raise CompileError(f"qaic_config is {config!r}: give its settings by name")
        found |= {str(name): value for name, value in cast("Mapping[Any, Any]", config or {}).items()}
    return found


def _read(name: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """One setting as options.

    Raises:
        CompileError: See `compile_options`.
    """
    if name in OPTIONS:
        return {} if value is None else {OPTIONS[name]: value}
    if name in _ANYWAY or name in _PASSES or any(name in options for _, _, options in _PASSES.values()):
        return {}
    if name in _NEEDS:
        needed, only = _NEEDS[name]
        if value is not None and value != only:
            raise CompileError(f"qaic_config has {name}={value!r}, which is not supported: give {only!r}")
        if value is not None and given.get(needed) is None:
            raise CompileError(f"qaic_config has {name}={value!r}, and compile has no {needed}: give it")
        return {}
    if name not in _REFUSED:
        of_passes = [key for pass_, (_, _, options) in _PASSES.items() for key in (pass_, *options)]
        known = (*OPTIONS, *_NEEDS, *_REFUSED, *_ANYWAY, *of_passes)
        raise CompileError(f"qaic_config has the unknown setting '{name}'; {nearest(name, known)}")
    anyway, what = _REFUSED[name]
    if not asks_for_nothing(value, anyway):
        raise CompileError(f"qaic_config has {name}={value!r}, which asks for {what}: leave {name} out")
    return {}
