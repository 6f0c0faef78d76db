"""An adapter as PEFT saves it: ``adapter_config.json`` and ``adapter_model.safetensors``, read as references.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import AdapterError, ModelLoadError
from qeff_ir.storage import FileRange

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"
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

_REFUSED = {
    "use_dora": "uses DoRA, which rescales the weights of the base model",
    "modules_to_save": "replaces whole modules (modules_to_save)",
    "trainable_token_indices": "replaces rows of an embedding (trainable_token_indices)",
    "layer_replication": "repeats layers of the base model (layer_replication)",
    "alora_invocation_tokens": "is active from a token on only (alora_invocation_tokens)",
    "use_qalora": "uses QALoRA",
    "use_bdlora": "uses BD-LoRA",
    "arrow_config": "routes between adapters (arrow_config)",
    "kasa_config": "uses KaSA",
    "monteclora_config": "uses MonteCLoRA",
    "velora_config": "uses VeLoRA",
    "megatron_config": "is made for Megatron's layers",
    "ensure_weight_tying": "ties its own weights (ensure_weight_tying)",
}
"""Fields of a configuration that change what the base model computes in other ways than a low-rank sum."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` that subtract the first adapter from the base model's weights."""


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
    if Path(name_or_folder).is_dir():
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
    config = _config(folder)
    entries = _entries(folder)
    tensors: dict[str, dict[str, FileRange]] = {}
    biases: dict[str, FileRange] = {}
    copies: dict[str, FileRange] = {}
    embeddings: set[str] = set()
    for key, entry in entries.items():
        name = key.removeprefix(_PREFIX)
        ending = next((e for e in _FACTORS if name.endswith("." + e)), None)
        if ending is not None:
            path = name.removesuffix("." + ending)
            tensors.setdefault(path, {})[_FACTORS[ending]] = entry
            if "embedding" in ending:
                embeddings.add(path)
        elif name.endswith(".bias") and config.bias != "none":
            biases[name.removesuffix(".bias").removesuffix(".base_layer")] = entry
        elif name.endswith((".weight", ".bias")):
            copies[name.replace(".base_layer.", ".")] = entry
        else:
            raise AdapterError(f"the adapter {folder} holds '{key}', which is no part of a low-rank adapter: refused")
    if not tensors:
        raise AdapterError(f"the adapter {folder} holds no low-rank factors: save it again with save_pretrained")
    layers = {path: _factors(folder, config, path, found, path in embeddings) for path, found in tensors.items()}
    return Adapter(folder, config, layers, biases, copies)


def _factors(folder: Path, config: LoraConfig, path: str, found: dict[str, FileRange], embedding: bool) -> Factors:
    from peft.utils.other import get_pattern_key

    if "a" not in found or "b" not in found:
        raise AdapterError(f"the adapter {folder} has only one of the factors of {path}: save it again")
    a, b, b_bias = found["a"], found["b"], found.get("b_bias")
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    try:
        target = _target(config, path)
        rank = ranks.get(get_pattern_key(list(ranks), target), config.r)
        alpha: Any = alphas.get(get_pattern_key(list(alphas), target), config.lora_alpha)
    except (AttributeError, TypeError, re.error) as error:
        raise AdapterError(
            f"the rank_pattern, alpha_pattern or target_parameters of the adapter {folder} cannot be read: {error}"
        ) from error
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(f"the adapter {folder} has the lora_alpha {alpha!r} for {path}, which is no number")
    leaf = path.removesuffix(".base_layer").rpartition(".")[2]
    if config.target_parameters and (path.endswith(".base_layer") or leaf == "experts"):
        raise AdapterError(
            f"the adapter {folder} changes the stacked parameters of {path} (target_parameters), which is not "
            "supported: train it on layers, or on routers"
        )
    fits = len(a.shape) == 2 and len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank and rank > 0
    if not fits or (b_bias is not None and b_bias.shape != b.shape[:1]):
        raise AdapterError(
            f"the factors of {path} in the adapter {folder} are {list(a.shape)} and {list(b.shape)}, its configuration "
            f"says rank {rank}: the two files are not of one adapter"
        )
    if not all(e.dtype.is_floating_point() for e in (a, b)):
        raise AdapterError(f"the factors of {path} in the adapter {folder} are no floating-point numbers")
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return Factors(a, b, b_bias, scaling, embedding)


def _target(config: LoraConfig, path: str) -> str:
    """What PEFT's patterns are matched with: the path of a layer, or of the parameter where one is the target."""
    for target in config.target_parameters or ():
        parameter = f"{path}.{target.rpartition('.')[2]}"
        if f".{parameter}".endswith(f".{target}"):
            return parameter
    return path


def _config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} has no {CONFIG_FILE}, so it is no adapter: give a folder that PEFT saved")
    try:
        raw: Any = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): save the adapter again") from error
    said: Any = raw.get("base_model_name_or_path")
    if said is not None and not isinstance(said, str):
        raise AdapterError(f"{path} names the base model {said!r}, which is no name: save the adapter again")
    if not isinstance(raw.get("use_rslora") or False, bool):  # as truth, the text "false" would be true
        raise AdapterError(f"{path} has use_rslora={raw['use_rslora']!r}: give true or false")
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"the adapter {folder} is of the type {raw.get('peft_type')}: only LORA is supported")
    for name, what in _REFUSED.items():
        if raw.get(name):
            raise AdapterError(f"the adapter {folder} {what}, which is not supported: train it without")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"the adapter {folder} was started with init_lora_weights={start!r}, which changes the base model: convert "
            "it when saving (path_initial_model_for_weight_conversion)"
        )
    from peft import LoraConfig

    names = {f for f in LoraConfig.__dataclass_fields__ if f not in ("runtime_config", "peft_type")}
    try:
        return LoraConfig(**{name: value for name, value in raw.items() if name in names})
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path} is no configuration that PEFT reads: {error}") from error


def _entries(folder: Path) -> dict[str, FileRange]:
    if not (folder / WEIGHTS_FILE).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
        found = f"only {', '.join(others)}, which can run code when it is read" if others else "no weights"
        raise AdapterError(
            f"the adapter {folder} has no {WEIGHTS_FILE} ({found}): save it with save_pretrained, which writes "
            "safetensors"
        )
    from qeff_ir.frontend.checkpoint import read_header

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
