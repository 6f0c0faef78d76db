"""An adapter as PEFT saves it: ``adapter_config.json`` and ``adapter_model.safetensors``, read as references.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.adapters.configuration import CONFIG_FILE, read_config
from qeff_ir.adapters.targets import ALL_LINEAR
from qeff_ir.errors import AdapterError, ModelLoadError
from qeff_ir.ranges import FileRange
from qeff_ir.reading import path_of, regular_file

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
}
"""Endings of tensor names, with the field of `Factors` that takes them."""

_MAX_ALPHA = 1e30
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_model")
"""Parts of a path that stand for what the model was wrapped in while it was trained."""


@dataclass
class Factors:
    """What an adapter adds to one layer: ``scaling * (x A^T B^T + b_bias)``.

    Attributes:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        b_bias: ``[out]``, or none.
        scaling: Factor of the sum.
        embedding: Whether the layer is one.
    """

    a: FileRange
    b: FileRange
    b_bias: FileRange | None
    scaling: float
    embedding: bool

    @property
    def rank(self) -> int:
        """Columns of the narrow product."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; no tensor is read until it is needed.

    Attributes:
        folder: Where it is.
        config: PEFT's configuration.
        layers: What each layer gets, by the layer's path in the base model.
        biases: Biases of the base model that the adapter replaces, by module path.
        copies: Tensors of the base model that PEFT saved along, by parameter name; they must be the base model's own.
    """

    folder: Path
    config: LoraConfig
    layers: dict[str, Factors]
    biases: dict[str, FileRange] = field(default_factory=dict[str, FileRange])
    copies: dict[str, FileRange] = field(default_factory=dict[str, FileRange])

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(factors.rank for factors in self.layers.values())

    @property
    def base(self) -> str:
        """Name of the base model, as the adapter has it; empty when it does not say."""
        return self.config.base_model_name_or_path or ""


def open_adapter(name_or_folder: str | Path, **hub: Any) -> Adapter:
    """Read an adapter from a local folder, or from the snapshot of a hub id (only the cache is used when offline).

    Args:
        name_or_folder: The folder or hub id.
        hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` of `huggingface_hub.snapshot_download`.

    Raises:
        AdapterError: There is no such adapter; see `read_adapter`.
    """
    if path_of(name_or_folder, "the adapter", AdapterError).is_dir():
        return read_adapter(name_or_folder)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(name_or_folder), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **hub)
    except Exception as error:  # the hub client and its transport raise many unrelated types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AdapterError(
            f"'{name_or_folder}' is neither a folder nor an adapter that the hub or its cache has ({reason})"
        ) from error
    return read_adapter(folder)


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's configuration and the header of its weights.

    Raises:
        AdapterError: There is none, it is damaged, its weights are a pickle, or it is of a kind that is not supported.
    """
    folder = Path(folder)
    config = read_config(folder)
    entries = _entries(folder)
    tensors: dict[str, dict[str, FileRange]] = {}
    biases: dict[str, FileRange] = {}
    copies: dict[str, FileRange] = {}
    embeddings: set[str] = set()
    bases: set[str] = set()
    for key, entry in entries.items():
        name = _name(folder, key)
        ending = next((e for e in _FACTORS if name.endswith("." + e)), None)
        if ending is not None:
            path = name.removesuffix("." + ending)
            if _FACTORS[ending] in tensors.setdefault(path, {}):
                raise AdapterError(f"the adapter {folder} holds a factor of {path} twice: save it again")
            tensors[path][_FACTORS[ending]] = entry
            if "embedding" in ending:
                embeddings.add(path)
        elif name.endswith(".bias") and config.bias != "none":
            bases.add(name)
            biases[name.removesuffix(".bias").removesuffix(".base_layer")] = entry
        elif name.endswith((".weight", ".bias")):
            copies[name.replace(".base_layer.", ".")] = entry
        else:
            raise AdapterError(f"the adapter {folder} holds '{key}', which is no part of a low-rank adapter: refused")
    if not tensors:
        raise AdapterError(f"the adapter {folder} holds no low-rank factors: save it again with save_pretrained")
    for name in bases:  # PEFT finds the bias of a layer that it has wrapped in the wrapper, and only there
        path = name.removesuffix(".bias").removesuffix(".base_layer")
        if name.endswith(".base_layer.bias") != (path in tensors):
            raise AdapterError(f"the adapter {folder} holds '{name}', which PEFT would leave out: save it again")
    layers = {path: _factors(folder, config, path, found, path in embeddings) for path, found in tensors.items()}
    return Adapter(folder, config, layers, biases, copies)


def _name(folder: Path, key: str) -> str:
    """The name of a tensor in the base model; PEFT passes over those that its own model does not have."""
    name = key.removeprefix(_PREFIX)
    wrapper = next((part for part in name.split(".") if part in _WRAPPERS), None)
    if name == key or wrapper is not None:
        what = f"has the part '{wrapper}' of a wrapper in it" if name != key else f"does not start with {_PREFIX[:-1]}"
        raise AdapterError(
            f"the adapter {folder} holds '{key}', which {what}, so that PEFT would leave it out: save the adapter of "
            "the model itself"
        )
    return name


def _factors(folder: Path, config: LoraConfig, path: str, found: dict[str, FileRange], embedding: bool) -> Factors:
    from peft.utils.other import get_pattern_key

    if "a" not in found or "b" not in found:
        raise AdapterError(f"the adapter {folder} has only one of the factors of {path}: save it again")
    a, b, b_bias = found["a"], found["b"], found.get("b_bias")
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    try:
        selected, target = _selected(config, path, embedding), _target(config, path)
        rank = ranks.get(get_pattern_key(list(ranks), target), config.r)
        alpha: Any = alphas.get(get_pattern_key(list(alphas), target), config.lora_alpha)
    except (AttributeError, TypeError, re.error) as error:
        raise AdapterError(
            f"the targets, rank_pattern, alpha_pattern or target_parameters of the adapter {folder} cannot be read: "
            f"{error}"
        ) from error
    if not selected:
        raise AdapterError(
            f"the adapter {folder} has factors for {path}, which its target_modules do not name, so that PEFT would "
            "leave them out: save it again"
        )
    if type(alpha) not in (int, float) or not abs(alpha) < _MAX_ALPHA:
        raise AdapterError(f"the adapter {folder} has the lora_alpha {alpha!r} for {path}, which is no number")
    leaf = path.removesuffix(".base_layer").rpartition(".")[2]
    if config.target_parameters and (path.endswith(".base_layer") or leaf == "experts"):
        raise AdapterError(
            f"the adapter {folder} changes the stacked weights of the experts in {path}, as PEFT stores "
            "target_parameters and names of experts' weights: not supported, train it on layers or on routers"
        )
    fits = len(a.shape) == 2 and len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank and rank > 0
    if b_bias is not None and not config.lora_bias:
        raise AdapterError(
            f"the adapter {folder} has a bias for {path}, its configuration says lora_bias=false, so that PEFT would "
            "leave it out: the two files are not of one adapter"
        )
    if not fits or (b_bias is not None and b_bias.shape != b.shape[:1]):
        raise AdapterError(
            f"the factors of {path} in the adapter {folder} are {list(a.shape)} and {list(b.shape)}, its configuration "
            f"says rank {rank}: the two files are not of one adapter"
        )
    if not all(e.dtype.is_floating_point() for e in (a, b)):
        raise AdapterError(f"the factors of {path} in the adapter {folder} are no floating-point numbers")
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return Factors(a, b, b_bias, scaling, embedding)


def _selected(config: LoraConfig, path: str, embedding: bool) -> bool:
    """Whether PEFT makes a branch at a layer."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return not embedding
    if config.target_parameters and (_target(config, path) != path or path.endswith(".base_layer")):
        return True
    return targets is not None and bool(check_target_module_exists(config, path))


def _target(config: LoraConfig, path: str) -> str:
    """What PEFT's patterns are matched with: the path of a layer, or of the parameter where one is the target."""
    for target in config.target_parameters or ():
        parameter = f"{path}.{target.rpartition('.')[2]}"
        if f".{parameter}".endswith(f".{target}"):
            return parameter
    return path


def _entries(folder: Path) -> dict[str, FileRange]:
    if not (folder / WEIGHTS_FILE).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
        found = f"only {', '.join(others)}, which can run code when it is read" if others else "no weights"
        raise AdapterError(
            f"the adapter {folder} has no {WEIGHTS_FILE} ({found}): save it with save_pretrained, which writes "
            "safetensors"
        )
    from qeff_ir.frontend.checkpoint.references import read_header

    regular_file(folder / WEIGHTS_FILE, folder, error=AdapterError)
    try:
        return read_header(folder / WEIGHTS_FILE)
    except ModelLoadError as error:
        raise AdapterError(f"the adapter {folder} is damaged: {error}") from error


def check_name(name: str) -> None:
    """Refuse what cannot be an adapter's name.

    Raises:
        AdapterError: It is empty, no text, or ``base``, which is the base model.
    """
    if not isinstance(name, str) or name in ("", "base"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(
            f"an adapter cannot be called {name!r}: it needs a name, and 'base' is that of the base model"
        )
