"""What is captured at the model's edge: attention, masks and cache writes, through transformers' extension points.

While a model is traced under `captured`, every attention is one op, every cache write is one op, and each mask is the
model's *own* mask function evaluated at ``q = position_ids`` and ``kv = the position in each cache slot``. Causal,
sliding and chunked masks, padded rows and chunked prefill all follow from the positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import PreTrainedModel

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend import private
from qeff_ir.frontend.capture import experts, ops, recurrences
from qeff_ir.frontend.capture.states import CapturingCache
from qeff_ir.ir import dialect

IMPLEMENTATION = "qeff"
"""Name of our attention and mask functions in transformers' registries."""

Tensor = ops.Tensor

_cache: CapturingCache | None = None


def _positions_mask(
    mask_function: Callable[..., Any] = causal_mask_function, batch_size: int = 1, **kwargs: Any
) -> Tensor | None:
    """The model's mask function at the true positions: bool ``[batch, 1, seq, ctx]``, True where a key is seen.

    That of a decoder over what its encoder made is the encoder's own mask, ``[batch, 1, seq, encoder_ctx]``, if any.
    """
    if _cache is None:
        raise UnsupportedModelError("the model builds a mask outside the traced forward pass")
    if _cache.cross.used and mask_function is bidirectional_mask_function:
        encoded: Tensor | None = kwargs.get("attention_mask")
        length = _cache.position_ids.shape[1]
        return None if encoded is None else encoded.to(torch.bool)[:, None, None, :].expand(-1, -1, length, -1)
    position_ids = _cache.position_ids
    layer = _cache.attention_layer()
    keys = layer.slots if layer is not None else None
    slots = position_ids if keys is None else torch.ops.qeff.cache_positions(keys, position_ids)
    if mask_function is bidirectional_mask_function:  # unused where nothing is encoded; refused where it is used
        return torch.ops.qeff.every_token(slots, position_ids)
    batch = torch.arange(position_ids.shape[0])[:, None, None, None]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.long)
    queries, seen = position_ids[:, None, :, None], slots[:, None, None, :]
    if _cache.of_run is not None:  # what is looked up is in the context, and a later token is seen if it is of this run
        # A layout may say the positions of slots once for all rows, and each row is looked up by itself.
        known = torch.where(seen == dialect.UNWRITTEN, torch.zeros_like(batch), seen)
        held = (seen <= queries) | ((_cache.of_run[batch, known] == 1) & (seen == known))
        mask = mask_function(batch, head, queries.clamp(min=0), known) & held & (queries >= 0)
    else:
        mask = mask_function(batch, head, queries, seen)
    mask = mask.expand(position_ids.shape[0], 1, position_ids.shape[1], slots.shape[1])
    _cache.masks.append(mask)
    return mask


def _additive_mask(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The same mask as a float bias, for models whose attention does not go through the interface.

    The hidden value is the least finite half: it vanishes in a softmax at any precision, and no row becomes NaN.
    """
    mask = _positions_mask(**kwargs)
    if mask is None:
        return None
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), HIDDEN, dtype=dtype))


HIDDEN = -65504.0
"""What a hidden key adds to a score, in masks that are added: the least finite half."""

HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings"})
"""Tensor keyword arguments of attention functions that do not change the attention itself."""


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
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as one op; signature and return value are those of transformers' attention functions.

    `indices` are the keys that an indexer chose for each query, ``[batch, seq, chosen]``.
    """
    unknown = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in HARMLESS]
    if unknown or attention_mask is None:
        what = f"takes {', '.join(sorted(unknown))}" if unknown else "has no mask"
        raise UnsupportedModelError(f"attention of {type(module).__name__} {what}, which is not captured yet")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    cap = float(softcap or 0.0)
    if attention_mask.is_floating_point():  # -inf in a whole row would be NaN, which spreads through the cache
        attention_mask = attention_mask.clamp(min=HIDDEN)
    if indices is not None:
        nothing = torch.zeros((*indices.shape[:2], key.shape[2]), dtype=torch.bool)
        attention_mask = attention_mask & nothing.scatter(-1, indices.long(), True).unsqueeze(1)
    if s_aux is not None:
        if attention_mask.is_floating_point():
            attention_mask = attention_mask > HIDDEN
        out = torch.ops.qeff.sink_attention(query, key, value, attention_mask, s_aux, scale, cap)
    else:
        out = torch.ops.qeff.attention(query, key, value, attention_mask, scale, cap)
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def captured(model: PreTrainedModel) -> Generator[None]:
    """Route the model's attention, masks and experts through our ops; in this thread, and until the block ends."""
    implementation = private.attention_implementations(model.config)
    chosen = model.get_experts_implementation() if private.has_experts(model) else None
    # Attention outside the interface takes its mask as the implementation does that the model is fixed to: "eager" adds
    # it to the scores, "sdpa" hands it to torch.
    masks = {IMPLEMENTATION: _positions_mask, "eager": _additive_mask, "sdpa": _positions_mask}
    try:
        with private.registered({IMPLEMENTATION: _attention}, masks):
            model.set_attn_implementation(IMPLEMENTATION if private.supports_attention_interface(model) else "eager")
            if private.has_experts(model):
                model.set_experts_implementation("batched_mm")
            loops = contextlib.nullcontext() if private.has_experts(model) else experts.unrolled(model)
            with loops, recurrences.replaced(model, lambda: _cache):
                yield
    finally:
        model.set_attn_implementation(implementation)
        if chosen is not None:
            model.set_experts_implementation(chosen)


@contextlib.contextmanager
def tracing(cache: CapturingCache) -> Generator[CapturingCache]:
    """Make `cache` the one whose positions the mask functions read."""
    global _cache
    before, _cache = _cache, cache
    try:
        yield cache
    finally:
        _cache = before
