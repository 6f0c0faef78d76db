"""A model of several parts, one of which answers in text: an auto class of transformers that opens that part alone.

A checkpoint of the whole is read then as transformers reads it for the part: its own conversions know the prefix.
"""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PreTrainedConfig

from qeff_ir.frontend import private
from qeff_ir.frontend.providers.provider import Provider

ProviderT = TypeVar("ProviderT", bound=Provider)


def answering_part(provider: ProviderT, auto: Any) -> ProviderT:
    """What an auto class opens of a model: all of it, or the only part whose configuration it knows.

    Args:
        provider: Of the whole.
        auto: transformers' auto class.

    Returns:
        The part; the whole itself where it is opened, no part is, or only its own code knows.
    """
    config = provider.config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    known = [part for part in parts if isinstance(part, PreTrainedConfig) and private.loads(auto, part)]
    whole = provider.remote or len(known) != 1 or private.loads(auto, config)
    return provider if whole else provider.part(known[0])
