"""Attention of a forward pass without a cache: captured as one op, under the model's own masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend import private
from qeff_ir.frontend.capture import experts, segments
from qeff_ir.frontend.capture.attention import HARMLESS, HIDDEN, IMPLEMENTATION
from qeff_ir.frontend.capture.own_thread import replaced

Tensor = torch.Tensor


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' boolean mask, always written out; none where every query sees every key.

    Returns:
        bool, ``[batch or 1, 1, queries, keys]``: what the mask function says of the positions, and the
        padding of the keys. transformers gathers the latter row by row; as a product of two masks it stays plain.
    """
    padding = kwargs.get("attention_mask")
    everything = kwargs.get("mask_function") is bidirectional_mask_function
    seen = kwargs | {"attention_mask": None, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    keys = padding.to(torch.bool)[:, None, None, :] if padding is not None else None
    if everything and keys is not None:
        return keys.expand(-1, -1, kwargs["q_length"], -1)
    mask = sdpa_mask(*args, **seen)
    return mask if keys is None or mask is None else mask & keys


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as one op; signature and return value are those of transformers' attention functions.

    A mask is boolean, float (added to the scores) or absent; without one, a causal module sees no later token.
    """
    unknown = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in HARMLESS]
    if unknown:
        raise UnsupportedModelError(
            f"attention of {type(module).__name__} takes {', '.join(sorted(unknown))}, which is not captured yet"
        )
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", False))
    if query.shape[0] < key.shape[0]:  # learned queries, the same for each row
        query = query.expand(key.shape[0], -1, -1, -1)
    if attention_mask is None and causal and query.shape[2] > 1:
        rows, columns = torch.arange(query.shape[2]), torch.arange(key.shape[2])
        attention_mask = (columns[None, :] <= rows[:, None])[None, None]
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if s_aux is None:
            return torch.ops.qeff.attention(query, key, value, mask, scale, float(softcap or 0.0))
        if mask is None:
            mask = torch.ones((1, 1, query.shape[2], key.shape[2]), dtype=torch.bool)
        return torch.ops.qeff.sink_attention(query, key, value, mask, s_aux, scale, float(softcap or 0.0))

    if attention_mask is None:
        piece = segments.attended(query, key, value, (id(module), scale, softcap), attend)
        if piece is not None:
            return piece, None
    out = attend(query, key, value, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _adding(get: Callable[..., Any]) -> Callable[..., Any]:
    """`AttentionInterface.get_interface`, whose eager functions are given no boolean mask: they add it to the scores.

    transformers makes masks that are to be added, but passes on one that a model has made, as only sdpa takes it.
    """

    def found(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = get(self, attn_implementation, default)

        def added(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                nothing = torch.zeros((), dtype=query.dtype)
                attention_mask = torch.where(attention_mask, nothing, torch.full_like(nothing, HIDDEN))
            return attend(module, query, key, value, attention_mask, **kwargs)

        return added if attend is default else attend

    return found


@contextlib.contextmanager
def encoding() -> Generator[None]:
    """Around a model's encoder inside of `qeff_ir.frontend.capture.attention.captured`, which is for its decoder."""
    with (
        private.registered({IMPLEMENTATION: _attention}, {IMPLEMENTATION: _mask, "eager": eager_mask}),
        replaced(AttentionInterface, "get_interface", _adding),
    ):
        yield


@contextlib.contextmanager
def captured_forward(model: PreTrainedModel) -> Generator[None]:
    """Route the model's attention and experts through our ops; in this thread, and until the block ends.

    Attention outside transformers' interface stays as the model writes it, in its eager form.
    """
    implementation = private.attention_implementations(model.config)
    chosen = model.get_experts_implementation() if private.has_experts(model) else None
    try:
        with (
            private.registered({IMPLEMENTATION: _attention}, {IMPLEMENTATION: _mask}),
            replaced(AttentionInterface, "get_interface", _adding),
        ):
            model.set_attn_implementation(IMPLEMENTATION if private.supports_attention_interface(model) else "eager")
            if private.has_experts(model):
                model.set_experts_implementation("batched_mm")
            with contextlib.nullcontext() if private.has_experts(model) else experts.unrolled(model):
                yield
    finally:
        model.set_attn_implementation(implementation)
        if chosen is not None:
            model.set_experts_implementation(chosen)
