"""What a sentence-transformers folder says of itself: pooling and normalization.

Format: ``modules.json`` lists the modules in order, each with a folder of its own and, where it has options, a
``config.json`` (https://sbert.net/docs/package_reference/sentence_transformer/models.html).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_ir.errors import ModelLoadError, UnsupportedModelError

_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean-sqrt-len",
    "weightedmean": "weighted-mean",
    "lasttoken": "last",
}
"""sentence-transformers' names of poolings, in the order in which several are concatenated, and ours."""

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older spelling: one switch for each, in the same order."""


_KINDS = ("Transformer", "Pooling", "Normalize")
"""The modules that are read, in their order."""


@dataclass(frozen=True)
class SentenceConfig:
    """What follows the transformer.

    Attributes:
        folder: Of the transformer itself.
        pooling: As the pass `embedding` spells it.
        normalize: Whether embeddings are scaled to unit length.
    """

    folder: Path
    pooling: str
    normalize: bool


def read_sentence_config(folder: Path) -> SentenceConfig | None:
    """Read a folder's modules; `None` when it is no sentence-transformers folder.

    Raises:
        ModelLoadError: A file is damaged, or names a folder outside.
        UnsupportedModelError: Its modules are not a transformer, then a pooling, then perhaps a normalization.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = [(m["type"].rpartition(".")[2], _inside(folder, m.get("path") or "", path)) for m in _modules(path)]
    kinds = [kind for kind, _ in modules]
    for kind in kinds:
        if kind not in _KINDS:
            raise UnsupportedModelError(
                f"{path} has a module of type {kind}, which is not read: only {', '.join(_KINDS)} are; "
                "pass pooling= with a torch module of your own that does the rest"
            )
    if not kinds or kinds != list(_KINDS[: len(kinds)]):
        raise UnsupportedModelError(
            f"{path} has the modules {', '.join(kinds) or 'of nothing'}: what is read is {', then '.join(_KINDS)}; "
            "pass pooling= with a torch module of your own that does the rest"
        )
    inner = dict(modules)
    pooling = _pooling(inner["Pooling"] / "config.json") if "Pooling" in inner else "none"
    return SentenceConfig(inner["Transformer"], pooling, "Normalize" in inner)


def _modules(path: Path) -> list[dict[str, Any]]:
    data = _json(path)
    if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in data):  # pyright: ignore[reportUnknownVariableType]
        raise ModelLoadError(f"{path} is not a list of modules with a type each: download the model again")
    return data  # pyright: ignore[reportUnknownVariableType]


def _inside(folder: Path, name: str, path: Path) -> Path:
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelLoadError(f"{path} names the folder {name!r}, which is no name: download the model again")
    try:
        inner = (folder / name).resolve()
        inner.exists()  # raises for a name that no file can have; a module without options may have no folder
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} names a folder that cannot be ({error}): download the model again") from error
    if not inner.is_relative_to(folder.resolve()):
        raise ModelLoadError(f"{path} names '{name}', a folder outside the model: refused")
    return inner if name else folder


def _pooling(path: Path) -> str:
    data = _json(path)
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} is not a pooling configuration: download the model again")
    named: Any = data.get("pooling_mode")  # pyright: ignore[reportUnknownMemberType]
    if named is None:
        named = [mode for flag, mode in _FLAGS.items() if data.get(flag)] or ["mean"]  # pyright: ignore[reportUnknownMemberType]
    modes: list[Any] = named if isinstance(named, list) else [named]
    unknown = [m for m in modes if not isinstance(m, str) or m not in _MODES]
    if unknown or not modes:
        what = f"'{unknown[0]}'" if unknown else "of no name"
        raise ModelLoadError(f"{path} asks for the pooling {what}: there is {', '.join(_MODES)}")
    if data.get("include_prompt") is False:  # pyright: ignore[reportUnknownMemberType]
        raise UnsupportedModelError(
            f"{path} leaves the prompt's tokens out (include_prompt), which is not supported: pass "
            f"pooling='{'+'.join(_MODES[m] for m in modes)}', which is the same for texts without a prompt"
        )
    return "+".join(_MODES[m] for m in modes)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON ({error}): download the model again") from error
