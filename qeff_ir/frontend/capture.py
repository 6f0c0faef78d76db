"""What is captured at the model's edge: attention, masks and cache writes, through transformers' extension points.

While a model is traced under `captured`, every attention is one op, every cache write is one op, and each mask is the
model's *own* mask function evaluated at ``q = position_ids`` and ``kv = the position in each cache slot``. Causal,
sliding and chunked masks, padded rows and chunked prefill all follow from the positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend import private

IMPLEMENTATION = "qeff"
"""Name of our attention and mask functions in transformers' registries."""

Tensor = torch.Tensor

_lib = torch.library.Library("qeff", "DEF")
_lib.define("cache_update(Tensor past, Tensor new, Tensor position_ids) -> Tensor")
_lib.define("cache_positions(Tensor past, Tensor position_ids) -> Tensor")
_lib.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap) -> Tensor")
_lib.define(
    "sink_attention(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor sinks, float scale, float softcap) -> Tensor"
)


def _like_past(past: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(past)


def _like_positions(past: Tensor, position_ids: Tensor) -> Tensor:
    return position_ids.new_empty((position_ids.shape[0], past.shape[2]))


def _like_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


torch.library.register_fake("qeff::cache_update", _like_past)
torch.library.register_fake("qeff::cache_positions", _like_positions)
torch.library.register_fake("qeff::attention", _like_attention)
torch.library.register_fake("qeff::sink_attention", _like_attention)


@dataclass(frozen=True)
class LayerSpec:
    """What the cache of one decoder layer holds, as seen by running the model once.

    Attributes:
        layer: Index of the layer in the model's cache.
        window: Tokens that a query sees of this layer, or `None` for all.
        key: Shape of one token's keys, ``(kv_heads, head_dim)``.
        value: Shape of one token's values, ``(kv_heads, head_dim)``.
    """

    layer: int
    window: int | None
    key: tuple[int, int]
    value: tuple[int, int]


class _Layer(DynamicLayer):
    """A cache layer of fixed length whose writes are single ops."""

    def __init__(self, window: int | None, past: tuple[Tensor, Tensor] | None, position_ids: Tensor) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self.window = window
        self.position_ids = position_ids
        self.seen: tuple[tuple[int, int], tuple[int, int]] | None = None
        self.keys: Tensor
        self.values: Tensor
        if past is not None:
            self.keys, self.values = past
            self.dtype, self.device = self.keys.dtype, self.keys.device
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:  # the probing run: only the shapes count
            self.keys, self.values = key_states, value_states
            self.seen = (
                (key_states.shape[1], key_states.shape[3]),
                (value_states.shape[1], value_states.shape[3]),
            )
            return key_states, value_states
        self.keys = torch.ops.qeff.cache_update(self.keys, key_states, self.position_ids)
        self.values = torch.ops.qeff.cache_update(self.values, value_states, self.position_ids)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.keys.shape[2] if self.is_initialized else query_length), 0

    def get_seq_length(self) -> int:
        return 0


class CapturingCache(Cache):
    """The cache handed to a model while it is traced.

    Args:
        model: The model; its configuration says which layer kinds there are.
        position_ids: ``[batch, seq]``, -1 for padding.
        specs: The layers that have a state; empty for the probing run that finds them.
        past: Key and value cache of each of `specs`, ``[batch, kv_heads, ctx, head_dim]``.

    Raises:
        UnsupportedModelError: The model has layers whose state is neither full nor sliding attention.
    """

    def __init__(
        self, model: PreTrainedModel, position_ids: Tensor, specs: list[LayerSpec], past: list[Tensor]
    ) -> None:
        states = {s.layer: (past[2 * i], past[2 * i + 1]) for i, s in enumerate(specs)}
        layers = [_Layer(window, states.get(i), position_ids) for i, window in enumerate(_layer_windows(model))]
        super().__init__(layers=list(layers))
        self.captured = layers
        self.position_ids = position_ids
        self.mask_layer = 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """As in transformers; also notes which layer the next mask is for."""
        self.mask_layer = layer_idx
        return self.captured[layer_idx].get_mask_sizes(query_length)

    def specs(self) -> list[LayerSpec]:
        """The layers that were written to, after a probing run."""
        return [
            LayerSpec(i, layer.window, *layer.seen) for i, layer in enumerate(self.captured) if layer.seen is not None
        ]

    def results(self) -> list[Tensor]:
        """The caches after a traced run, key then value of each layer that has a state."""
        return [t for layer in self.captured if layer.is_initialized for t in (layer.keys, layer.values)]


def _layer_windows(model: PreTrainedModel) -> list[int | None]:
    windows: list[int | None] = []
    layers = DynamicCache(config=model.config).layers
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    for layer in layers or [DynamicLayer() for _ in range(count)]:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps a {type(layer).__name__} state in layer {len(windows)}, which cannot be "
                "retained yet: only full and sliding-window attention caches can"
            )
    return windows


_cache: CapturingCache | None = None


def _positions_mask(
    mask_function: Callable[..., Any] = causal_mask_function, batch_size: int = 1, **kwargs: Any
) -> Tensor:
    """The model's mask function at the true positions: bool ``[batch, 1, seq, ctx]``, True where a key is seen."""
    if _cache is None:
        raise UnsupportedModelError("the model builds a mask outside the traced forward pass")
    if mask_function is bidirectional_mask_function:
        raise UnsupportedModelError(
            "the model's attention sees later tokens, as an encoder's does, so it cannot generate token by token: if "
            "it is meant to be a decoder, set is_decoder in its configuration"
        )
    position_ids = _cache.position_ids
    layer = _cache.captured[_cache.mask_layer]
    slots = torch.ops.qeff.cache_positions(layer.keys, position_ids) if layer.is_initialized else position_ids
    batch = torch.arange(position_ids.shape[0])[:, None, None, None]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.long)
    mask = mask_function(batch, head, position_ids[:, None, :, None], slots[:, None, None, :])
    return mask.expand(position_ids.shape[0], 1, position_ids.shape[1], slots.shape[1])


def _additive_mask(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """The same mask as a float bias, for models whose attention does not go through the interface.

    The hidden value is the least finite half: it vanishes in a softmax at any precision, and no row becomes NaN.
    """
    mask = _positions_mask(**kwargs)
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), -65504.0, dtype=dtype))


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as one op; signature and return value are those of transformers' attention functions."""
    unknown = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in HARMLESS]
    if unknown or attention_mask is None:
        what = f"takes {', '.join(sorted(unknown))}" if unknown else "has no mask"
        raise UnsupportedModelError(f"attention of {type(module).__name__} {what}, which is not captured yet")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    cap = float(softcap or 0.0)
    if s_aux is not None:
        out = torch.ops.qeff.sink_attention(query, key, value, attention_mask, s_aux, scale, cap)
    else:
        out = torch.ops.qeff.attention(query, key, value, attention_mask, scale, cap)
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def captured(model: PreTrainedModel) -> Generator[None]:
    """Route the model's attention, masks and experts through our ops; everything is put back on exit."""
    saved = private.snapshot_registries()
    implementation = private.attention_implementation(model)
    experts = model.get_experts_implementation() if private.has_experts(model) else None
    # Attention outside the interface takes its mask as the implementation does that the model is fixed to: "eager" adds
    # it to the scores, "sdpa" hands it to torch.
    try:
        AttentionInterface.register(IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(IMPLEMENTATION, _positions_mask)
        AttentionMaskInterface.register("eager", _additive_mask)
        AttentionMaskInterface.register("sdpa", _positions_mask)
        model.set_attn_implementation(IMPLEMENTATION if private.supports_attention_interface(model) else "eager")
        if private.has_experts(model):
            model.set_experts_implementation("batched_mm")
        yield
    finally:
        private.restore_registries(saved)
        model.set_attn_implementation(implementation)
        if experts is not None:
            model.set_experts_implementation(experts)


@contextlib.contextmanager
def tracing(cache: CapturingCache) -> Generator[CapturingCache]:
    """Make `cache` the one whose positions the mask functions read."""
    global _cache
    before, _cache = _cache, cache
    try:
        yield cache
    finally:
        _cache = before
