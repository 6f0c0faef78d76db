"""Small models of every architecture: a default configuration shrunk by data, and weights that show a fault."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_MOST_KINDS = 4
"""Layers of a small model; an architecture with more kinds says itself how they are chosen."""


Data = Mapping[str, Any]
"""What a file of configurations says, `coverage_configs.toml` for one."""


@functools.cache
def data() -> dict[str, Any]:
    """What `coverage_configs.toml` says."""
    return read_data("coverage_configs.toml")


def read_data(name: str) -> dict[str, Any]:
    """What a file of configurations beside this one says."""
    return tomllib.loads((Path(__file__).parent / name).read_text())


def small_config(model_type: str, given: Data | None = None) -> PreTrainedConfig:
    """The small configuration of one architecture.

    Args:
        model_type: transformers' name of it.
        given: How it is made small; as `data` says by default.
    """
    given = data() if given is None else given
    own = dict(given["architectures"].get(model_type, {}))
    default = CONFIG_MAPPING[model_type](**own.pop("_default", {}))
    return shrink(default, own, given)


def shrink(config: PreTrainedConfig, own: Mapping[str, Any], given: Data | None = None) -> PreTrainedConfig:
    """A configuration of the same class at small sizes.

    Args:
        config: Says which fields there are, and which layers.
        own: What this architecture needs besides.
        given: As for `small_config`.
    """
    return type(config)(**_small(config, own, data() if given is None else given))


def _small(default: PreTrainedConfig, own: Mapping[str, Any], given: Data) -> dict[str, Any]:
    fields = default.to_dict()
    made = {**_sizes(fields, given), **_layers(fields)}
    parts: Mapping[str, Mapping[str, Any]] = given.get("parts", {})
    for name in default.sub_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            changed = _small(inner, {**parts.get(inner.model_type, {}), **own.get(name, {})}, given)
            made[name] = {"model_type": inner.model_type, **changed} if inner.model_type else changed
    return {**made, **{k: v for k, v in own.items() if k not in default.sub_configs or not isinstance(v, Mapping)}}


def _sizes(fields: Mapping[str, Any], given: Data) -> dict[str, Any]:
    known, relative = given["sizes"], given["relative"]
    made = {k: known[k] for k, v in fields.items() if k in known and type(v) in (int, float, bool)}
    for name, rule in relative.items():
        value = fields.get(name)
        if type(value) is not int:
            continue
        if isinstance(rule, dict):
            made[name] = rule["one" if value == 1 else "some"]
        else:
            heads = fields.get(rule)
            made[name] = 4 if value == heads else 1 if value == 1 else 2
    return made


def _layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with one entry a layer, cut to one layer of each kind, and the number of layers that are left."""
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        count = fields.get(name)
        if type(count) is not int or count < 2:
            continue
        lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == count}
        if not lists:
            return {}
        kinds: dict[str, int] = {}
        for index in range(count):
            kinds.setdefault(repr([v[index] for v in lists.values()]), index)
        chosen = sorted(kinds.values())[:_MOST_KINDS]
        chosen = chosen if len(chosen) > 1 else [0, 1]
        return {name: len(chosen), **{k: [v[i] for i in chosen] for k, v in lists.items()}}
    return {}


def build(
    config: PreTrainedConfig, *, auto: Any = AutoModelForCausalLM, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of a configuration, float32, seeded; biases and scales are not the 0 and 1 that hide a lost one."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
