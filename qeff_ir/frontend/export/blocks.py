"""Which tokens of a prompt see later ones: a model has one of the forms known here, or is not understood."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from transformers import PreTrainedModel

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.ir.ports import PICTURE_TOKENS, PICTURES_TOKENS, PREFIX_TOKENS, Role

Tensor = torch.Tensor

_TYPES = (0, 1, 1, 0, 1, 1, 0)
"""Two pictures of two tokens between words."""
_SEEING: dict[Role, set[tuple[int, int]]] = {
    PICTURE_TOKENS: {(1, 2), (4, 5)},
    PICTURES_TOKENS: set(combinations((1, 2, 4, 5), 2)),
    PREFIX_TOKENS: set(combinations((0, 3, 6), 2)),
}
"""Who sees which later token: those of one picture one another, those of all, or those of the type of words."""


def find_blocks(model: PreTrainedModel, types: str) -> Role:
    """Who sees later tokens in a model whose masks follow the types of tokens.

    A prompt is cut where nobody looks ahead, so that whoever sees a later token has it in its own run.

    Args:
        model: The model.
        types: What it calls the types.

    Returns:
        The role of the types, which says where a prompt may be cut.

    Raises:
        UnsupportedModelError: Tokens see later ones in another form, or nothing tells which do.
    """
    name, make = type(model).__name__, getattr(model, "create_masks_for_generate", None)
    if make is None:
        raise UnsupportedModelError(
            f"{name} has no create_masks_for_generate, which tells the tokens that see one another: where its prompts "
            "may be cut is not known"
        )
    made: Any = make(**_request(model, types, inspect.signature(make).parameters))
    later = set[tuple[int, int]]().union(*(_later(m) for m in (made.values() if isinstance(made, Mapping) else [made])))
    found = next((role for role, seeing in _SEEING.items() if later <= seeing), None)
    if found is None:
        first, last = min(later - _SEEING[PICTURE_TOKENS])
        said = ["words" if _TYPES[at] == 0 else "tokens of a picture" for at in (first, last)]
        raise UnsupportedModelError(
            f"{name} lets {said[0]} see later {said[1]}: only models in which the tokens of one picture, of all "
            "pictures, or of the whole prompt see one another can be given a prompt in parts"
        )
    return found


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
