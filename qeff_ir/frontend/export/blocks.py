"""Which tokens of a prompt see later ones: those of one picture, one another, or a model is not understood."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from qeff_ir.errors import UnsupportedModelError

Tensor = torch.Tensor

_TYPES = (0, 1, 1, 0, 1, 1, 0)
"""Two pictures of two tokens between words."""
_WITHIN = {(1, 2), (4, 5)}
"""Who sees which later token, where only the tokens of a picture do."""


def check_blocks(model: PreTrainedModel, types: str) -> None:
    """Refuse a model in which other tokens than those of one picture see later ones.

    A prompt is cut between pictures, so that whoever sees a later token must have it in its own run.

    Args:
        model: A model whose masks follow the types of tokens.
        types: What it calls them.

    Raises:
        UnsupportedModelError: Words or tokens of another picture see later tokens, or nothing tells which do.
    """
    name, make = type(model).__name__, getattr(model, "create_masks_for_generate", None)
    if make is None:
        raise UnsupportedModelError(
            f"{name} has no create_masks_for_generate, which tells the tokens that see one another: where its prompts "
            "may be cut is not known"
        )
    made: Any = make(**_request(model, types, inspect.signature(make).parameters))
    for mask in made.values() if isinstance(made, Mapping) else [made]:
        wrong = _later(mask) - _WITHIN
        if wrong:
            first, later = min(wrong)
            said = "words" if _TYPES[first] == 0 else "tokens of a picture"
            raise UnsupportedModelError(
                f"{name} lets {said} see later {'words' if _TYPES[later] == 0 else 'pictures'}: only models in which "
                "the tokens of one picture see one another can be given a prompt in parts"
            )


def _request(model: PreTrainedModel, types: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the first step for a prompt of `_TYPES`."""
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    config._attn_implementation = text._attn_implementation = "eager"  # whose masks are tensors
    places = torch.arange(len(_TYPES))[None]
    found = {
        "config": config,
        "inputs_embeds": torch.zeros(1, len(_TYPES), text.hidden_size),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": places,
        types: torch.tensor([_TYPES]),
    }
    return {**found, "is_first_iteration": True} if "is_first_iteration" in parameters else found


def _later(mask: Tensor | None) -> set[tuple[int, int]]:
    """Each token, and a later one that it sees, by a mask ``[1, 1, tokens, tokens]``; `None` is the causal one."""
    if mask is None:
        return set()
    seen = mask[0, 0] if mask.dtype is torch.bool else mask[0, 0] == 0
    return {(int(at), int(later)) for at, later in seen.triu(1).nonzero()}
