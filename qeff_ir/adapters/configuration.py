"""``adapter_config.json``: every field of PEFT's configuration is applied, changes nothing, or is refused by name."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qeff_ir.errors import AdapterError
from qeff_ir.reading import read_json

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"

REFUSED = {
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
"""Fields that change what the base model computes in other ways than a low-rank sum, where they are set at all."""

APPLIED: dict[str, tuple[Any, ...]] = {
    "base_model_name_or_path": (str, None),
    "revision": (str, None),
    "r": (int,),
    "lora_alpha": (int, float),
    "use_rslora": (bool, None),
    "rank_pattern": (dict[str, int], None),
    "alpha_pattern": (dict[str, Any], None),
    "target_modules": (str, list[str], None),
    "target_parameters": (list[Any], None),
    "exclude_modules": (str, list[str], None),
    "layers_to_transform": (int, list[int], None),
    "layers_pattern": (str, list[str], None),
    "lora_bias": (bool, None),
}
"""Fields that are applied, with what they may be; the numbers are held against the tensors."""

CHECKED = ("peft_type", "task_type", "bias", "init_lora_weights", "fan_in_fan_out")
"""Fields of which some values are refused; see `read_config`."""

HARMLESS = (
    "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
)  # fmt: skip
"""Fields of training, and of variants that are refused where they are switched on."""

_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Texts as ``init_lora_weights`` that leave the base model's weights alone; others subtract the first adapter."""

_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")
"""Values of ``task_type`` by which PEFT adds no head of its own."""


def read_config(folder: Path) -> LoraConfig:
    """Read an adapter's configuration as PEFT would.

    Raises:
        AdapterError: There is none, or it says something that is not supported.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise AdapterError(f"{folder} has no {CONFIG_FILE}, so it is no adapter: give a folder that PEFT saved")
    raw: Any = read_json(path, folder, error=AdapterError)
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} cannot be read (not a JSON object): save the adapter again")
    fields = cast("dict[str, Any]", raw)
    _check_types(path, fields)
    _check_values(folder, fields)
    from peft import LoraConfig

    try:
        taken = LoraConfig.__dataclass_fields__.keys() - {"peft_type", "runtime_config"}
        return LoraConfig(**{name: value for name, value in fields.items() if name in taken})
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise AdapterError(f"{path} is no configuration that PEFT reads: {error}") from error


def _check_types(path: Path, fields: dict[str, Any]) -> None:
    said = fields.get("base_model_name_or_path")
    if said is not None and not isinstance(said, str):
        raise AdapterError(f"{path} names the base model {said!r}, which is no name: save the adapter again")
    for name, kinds in APPLIED.items():
        if name in fields and name != "lora_alpha" and not any(_is(kind, fields[name]) for kind in kinds):
            raise AdapterError(f"{path} has {name}={_short(fields[name])}: save the adapter again")


def _check_values(folder: Path, fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise AdapterError(f"the adapter {folder} is of the type {fields.get('peft_type')}: only LORA is supported")
    for name, what in REFUSED.items():
        if fields.get(name):
            raise AdapterError(f"the adapter {folder} {what}, which is not supported: train it without")
    known = {*REFUSED, *APPLIED, *CHECKED, *HARMLESS}
    strange = next((name for name, value in fields.items() if name not in known and value), None)
    if strange is not None:
        raise AdapterError(f"the adapter {folder} sets {strange[:60]!r}, a field that is not known here: take it out")
    start = fields.get("init_lora_weights")
    if type(start) not in (bool, types.NoneType) and not (isinstance(start, str) and start.lower() in _STARTS):
        raise AdapterError(
            f"the adapter {folder} was started with init_lora_weights={_short(start)}, which changes the base model: "
            "convert it when saving (path_initial_model_for_weight_conversion)"
        )
    task = fields.get("task_type")
    if task not in _TASKS:
        raise AdapterError(f"the adapter {folder} is made for the task {_short(task)}, which brings a head of its own")
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterError(f"the adapter {folder} has bias={_short(fields['bias'])}: give none, all or lora_only")
    if not isinstance(fields.get("fan_in_fan_out", False), bool):
        raise AdapterError(f"the adapter {folder} has fan_in_fan_out={_short(fields['fan_in_fan_out'])}: give a bool")


def _is(kind: Any, value: object) -> bool:
    if isinstance(kind, types.GenericAlias):
        inner = typing.get_args(kind)[-1]
        if typing.get_origin(kind) is dict:
            return isinstance(value, dict) and all(_is(inner, v) for v in cast("dict[str, object]", value).values())
        return isinstance(value, list) and all(_is(inner, v) for v in cast("list[object]", value))
    return kind is Any or (value is None if kind is None else type(value) is kind)


def _short(value: object) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:50]}…"
