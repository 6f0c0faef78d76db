# pyright: reportPrivateUsage=false
"""Everything private of transformers' generation that the runtime calls, in one place.

``tests/runtime/test_private.py`` tells when one of these moves.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.utils import GenerationMixin


def merge(
    model: Any, given: GenerationConfig | None, arguments: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """One configuration of a request: the arguments over the object over the model's own defaults over transformers'.

    Args:
        model: A `GenerationMixin`, with the defaults as ``generation_config``.
        given: The caller's object; not changed.
        arguments: Keyword arguments of ``generate`` that are not its own parameters.

    Returns:
        The configuration, and the arguments that are not fields of one.
    """
    config, rest = model._prepare_generation_config(given, **arguments)
    return config, rest


def set_special_tokens(model: Any, config: GenerationConfig) -> tuple[int | None, list[int]]:
    """Have transformers settle which tokens pad and which stop; it keeps them in `config`.

    Returns:
        The token that fills rows up, and those that end a row.
    """
    model._prepare_special_tokens(config, device="cpu")
    pad, stops = config._pad_token_tensor, config._eos_token_tensor
    return None if pad is None else int(pad), [] if stops is None else [int(t) for t in stops]


def infer_mask(model: Any, ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """The mask of token ids that come without one, int64 like `ids`; `config` is from `set_special_tokens`."""
    return model._prepare_attention_mask_for_generation(ids, config, {})


def stopping_criteria(model: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
    """The criteria that transformers makes of its settings; a model may add to them by overriding its own method."""
    theirs: Any = GenerationMixin
    return theirs._get_stopping_criteria(model, *args, **kwargs)


def generated_length(model: Any, *args: Any, **kwargs: Any) -> GenerationConfig:
    """Settings with the length that transformers makes of them; a model may overrule it by its own method."""
    theirs: Any = GenerationMixin
    return theirs._prepare_generated_length(model, *args, **kwargs)
