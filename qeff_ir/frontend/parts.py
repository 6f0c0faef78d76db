"""A model of several parts, one of which answers in text: an auto class of transformers that opens that part alone.

A checkpoint of the whole is read then as transformers reads it for the part: its own conversions know the prefix.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from qeff_ir.frontend import private


def answering_config(config: PreTrainedConfig, auto: Any) -> PreTrainedConfig:
    """What an auto class opens of a configuration: all of it, or the only part that it knows.

    Args:
        config: Of the whole.
        auto: transformers' auto class.

    Returns:
        The configuration of the part; the given one where it is opened itself, or no part is.
    """
    parts = [getattr(config, name, None) for name in config.sub_configs]
    known = [part for part in parts if isinstance(part, PreTrainedConfig) and private.loads(auto, part)]
    return known[0] if len(known) == 1 and not private.loads(auto, config) else config


def answering_model(model: PreTrainedModel, auto: Any) -> PreTrainedModel:
    """The same of a model in memory, by the configurations of the models in it."""
    part = answering_config(model.config, auto)
    if part is model.config:
        return model
    own = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return next((child for child in own if type(child.config) is type(part)), model)
