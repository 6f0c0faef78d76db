"""The configuration of a model folder: config.json, read once, without what would choose code or files elsewhere."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qeff_ir.errors import ModelLoadError, UnsupportedModelError, first_line
from qeff_ir.reading import parse_json, plain_name, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG = "config.json"

DROPPED = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)
"""Fields that name an implementation, at any depth: they change no number, and could name one on the hub."""

REFUSED: dict[str, str] = {
    "configuration_files": "names other configurations for other versions of transformers",
    "fusion_config": "changes the model's own code",
}
"""Fields that transformers acts on and that are not supported, and what they do."""

QUANTIZATION = "quantization_config"

_LAYERS = re.compile(r"(^|_)(n_)?(layers?|blocks?|depths?)$")
"""Fields that count layers."""

_OWN_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Fields that count the layers of the model itself, when they are not in a part's configuration."""

_FEW_LAYERS, _MANY_LAYERS, _MANY_LABELS = 100, 1_000, 100_000
"""What is never too much, whatever the checkpoint has: of the model's own layers, of any layers, of labels."""


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in a folder; its code runs only if it is trusted, and nobody is asked.

    Raises:
        ModelLoadError: There is none, it is damaged, or it brings code that may not run.
        UnsupportedModelError: A field asks for what is not supported.
    """
    return make_config(read_fields(folder, trust_remote_code), folder, trust_remote_code)


def read_fields(folder: Path, trust_remote_code: bool, data: bytes | None = None) -> dict[str, Any]:
    """What config.json says, checked, without the names of implementations.

    Args:
        folder: The model.
        trust_remote_code: Whether code of the folder may run.
        data: The file's bytes, when they have been read already.

    Raises:
        ModelLoadError, UnsupportedModelError: See `read_config`.
    """
    path = folder / CONFIG
    if data is None:
        if not path.exists() and not path.is_symlink():
            raise ModelLoadError(f"{folder} has no {CONFIG}, so {_what_it_is(folder)}")
        data = read_bytes(path, folder)
    try:
        raw = parse_json(data, str(path))
    except ModelLoadError as error:
        raise ModelLoadError(f"{path} is not a configuration that transformers reads: {error}") from error
    if not isinstance(raw, dict):
        raise ModelLoadError(f"{path} is not a configuration that transformers reads: it is not a JSON object")
    fields = cast("dict[str, Any]", raw)
    if "auto_map" in fields and not trust_remote_code:
        raise ModelLoadError(
            f"{folder} brings code of its own (auto_map in {CONFIG}): read it, then pass trust_remote_code=True "
            "(--trust-remote-code)"
        )
    architectures = fields.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise ModelLoadError(f"{path} has no list of architectures: give the name of the model's class in a list")
    for name in cast("list[Any]", architectures or []):
        plain_name(name, f"an architecture in {path}")
    for inner in _objects(fields):
        for name in DROPPED & inner.keys():
            del inner[name]
        if inner is not fields and inner.get(QUANTIZATION) is not None:
            raise UnsupportedModelError(
                f"{folder} holds quantized weights in a part of the model ({QUANTIZATION} inside of {CONFIG}), which "
                "are not read: use the unquantized checkpoint, and let the target compress (mxfp6_matmul)"
            )
    for name, what in REFUSED.items():
        if fields.get(name) is not None:
            raise UnsupportedModelError(f"{path} {what} ({name}), which is not supported: take the field out")
    return fields


def check_sizes(fields: dict[str, Any], folder: Path, tensors: int, largest: int) -> None:
    """Compare counts with the checkpoint, before a model of them is built.

    Args:
        fields: See `read_fields`.
        folder: The model, for the message.
        tensors: How many tensors the checkpoint has.
        largest: The largest size in it.

    Raises:
        ModelLoadError: There are many more layers than tensors, or more labels than anything has rows.
    """
    for inner in _objects(fields):
        for name, value in inner.items():
            if not isinstance(value, int):
                continue
            most = None
            if _LAYERS.search(name):
                own = inner is fields and name in _OWN_LAYERS
                most = max(_FEW_LAYERS if own else _MANY_LAYERS, tensors)
            elif name == "num_labels":
                most = max(_MANY_LABELS, largest)
            if most is not None and value > most:
                raise ModelLoadError(
                    f"{folder / CONFIG} says {name}={value}, and the checkpoint has {tensors} tensors, the largest "
                    f"size of which is {largest}: the weights belong to another configuration"
                )


def make_config(fields: dict[str, Any], folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """transformers' configuration of what `read_fields` gave; it says nothing of how the weights are quantized.

    Raises:
        ModelLoadError: transformers cannot make one.
    """
    from transformers import AutoConfig

    path = folder / CONFIG
    try:
        if trust_remote_code and "auto_map" in fields:
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            if read_fields(folder, trust_remote_code) != fields:
                raise ModelLoadError(f"{path} was changed while it was read: open the model again")
            _forget_implementations(config)
            config.__dict__.pop(QUANTIZATION, None)
            config.name_or_path = str(folder)  # where the code of the model is looked for
            return config
        with tempfile.TemporaryDirectory(prefix="qeff-config-") as place:  # only what was checked is read
            (Path(place) / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if k != QUANTIZATION}))
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if "_name_or_path" not in fields:
            config.name_or_path = str(folder)
        return config
    except ModelLoadError:
        raise
    except Exception as error:  # transformers raises whatever its many configurations raise
        reason = re.sub(r"\S*qeff-config-\w+", str(folder), first_line(error))
        raise ModelLoadError(f"{path} is not a configuration that transformers reads: {reason}") from error


def remote_code(fields: dict[str, Any]) -> list[str]:
    """The classes that ``auto_map`` names: ``file.Class``, or ``repository--file.Class``."""
    named = fields.get("auto_map")
    values = cast("dict[str, Any]", named).values() if isinstance(named, dict) else ()
    return [str(v) for value in values for v in (cast("list[Any]", value) if isinstance(value, list) else [value])]


def _objects(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a configuration: itself, and those inside of it."""
    level: list[Any] = [fields]
    while level:
        found = [cast("dict[str, Any]", item) for item in level if isinstance(item, dict)]
        yield from found
        lists = [cast("list[Any]", item) for item in level if isinstance(item, list)]
        level = [inner for item in found for inner in item.values()] + [inner for item in lists for inner in item]


def _forget_implementations(config: PreTrainedConfig) -> None:
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part._attn_implementation = None  # pyright: ignore[reportPrivateUsage]
            part._experts_implementation = None  # pyright: ignore[reportPrivateUsage]


def _what_it_is(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            "it is an adapter and not a model: open it with QEffAutoPeftModelForCausalLM, or, if it is not of a causal "
            "LM, merge it into its base model with PEFT (merge_and_unload) and save that"
        )
    return "it is not a model folder: give the folder of a saved model"
