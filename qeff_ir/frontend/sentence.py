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
        UnsupportedModelError: It has a module that is neither a transformer, a pooling nor a normalization.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    found = SentenceConfig(folder, "none", False)
    for index, module in enumerate(_modules(path)):
        kind = module["type"].rpartition(".")[2]
        inner = _inside(folder, module.get("path") or "", path)
        if kind == "Transformer" and index == 0:
            found = SentenceConfig(inner, found.pooling, found.normalize)
        elif kind == "Pooling":
            found = SentenceConfig(found.folder, _pooling(inner / "config.json"), found.normalize)
        elif kind == "Normalize":
            found = SentenceConfig(found.folder, found.pooling, True)
        else:
            raise UnsupportedModelError(
                f"{path} has a module of type {kind}, which is not read: only Transformer, Pooling and Normalize are; "
                "pass pooling= with a torch module of your own that does the rest"
            )
    return found


def _modules(path: Path) -> list[dict[str, Any]]:
    data = _json(path)
    if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in data):  # pyright: ignore[reportUnknownVariableType]
        raise ModelLoadError(f"{path} is not a list of modules with a type each: download the model again")
    return data  # pyright: ignore[reportUnknownVariableType]


def _inside(folder: Path, name: str, path: Path) -> Path:
    inner = (folder / name).resolve()
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
    modes: list[Any] = [named] if isinstance(named, str) else list(named)
    unknown = [m for m in modes if m not in _MODES]
    if unknown:
        raise ModelLoadError(f"{path} asks for the pooling '{unknown[0]}': there is {', '.join(_MODES)}")
    return "+".join(_MODES[m] for m in modes)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON ({error}): download the model again") from error
