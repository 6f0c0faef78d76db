"""The dialect's ops as torch sees them: opaque while a model is traced, one ONNX node each afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import values

from qeff_ir.ir import dialect

Tensor = torch.Tensor

_lib = torch.library.Library("qeff", "DEF")
_lib.define("cache_update(Tensor past, Tensor new, Tensor position_ids) -> Tensor")
_lib.define("cache_positions(Tensor past, Tensor position_ids) -> Tensor")
_lib.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap) -> Tensor")
_lib.define(
    "sink_attention(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor sinks, float scale, float softcap) -> Tensor"
)
_lib.define("layer_input(Tensor hidden) -> Tensor")
_lib.define("layer_output(Tensor hidden) -> Tensor")
_lib.define("state_window(Tensor past, Tensor new, Tensor position_ids) -> Tensor")
_lib.define("state_next(Tensor window, Tensor position_ids, int size) -> Tensor")
_lib.define("every_token(Tensor slots, Tensor position_ids) -> Tensor")
_lib.define("spread_tokens(Tensor past, Tensor values, Tensor position_ids) -> Tensor")
_lib.define("merge_rows(Tensor embeds, Tensor mask, Tensor rows, Tensor first) -> (Tensor, Tensor)")
_lib.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor past, Tensor position_ids, "
    "float delta) -> (Tensor, Tensor)"
)


def _like_past(past: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(past)


def _like_positions(past: Tensor, position_ids: Tensor) -> Tensor:
    return position_ids.new_empty((position_ids.shape[0], past.shape[2]))


def _like_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _like_window(past: Tensor, new: Tensor, position_ids: Tensor) -> Tensor:
    return new.new_empty((*new.shape[:-1], past.shape[-1] + new.shape[-1]))


def _like_next(window: Tensor, position_ids: Tensor, size: int) -> Tensor:
    return window.new_empty((*window.shape[:-1], size))


def _like_mask(slots: Tensor, position_ids: Tensor) -> Tensor:
    return position_ids.new_empty((position_ids.shape[0], 1, position_ids.shape[1], slots.shape[1]), dtype=torch.bool)


def _like_linear(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, past: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(past)


def _like_spread(past: Tensor, values: Tensor, position_ids: Tensor) -> Tensor:
    return values.new_empty((values.shape[0], past.shape[2]))


def _like_merge(embeds: Tensor, mask: Tensor, rows: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(embeds), torch.empty_like(first)


torch.library.register_fake("qeff::cache_update", _like_past)
torch.library.register_fake("qeff::cache_positions", _like_positions)
torch.library.register_fake("qeff::attention", _like_attention)
torch.library.register_fake("qeff::sink_attention", _like_attention)
torch.library.register_fake("qeff::layer_input", torch.empty_like)
torch.library.register_fake("qeff::layer_output", torch.empty_like)
torch.library.register_fake("qeff::state_window", _like_window)
torch.library.register_fake("qeff::state_next", _like_next)
torch.library.register_fake("qeff::every_token", _like_mask)
torch.library.register_fake("qeff::spread_tokens", _like_spread)
torch.library.register_fake("qeff::merge_rows", _like_merge)
torch.library.register_fake("qeff::linear_attention", _like_linear)


def _opaque(name: str, *attributes: str) -> Callable[..., Any]:
    op = values.Op(values.Opset(dialect.DOMAIN, dialect.VERSION), name)

    def translate(*args: Any) -> Any:
        count = len(args) - len(attributes)
        return op(*args[:count], **dict(zip(attributes, args[count:], strict=True)))

    return translate


# The exporter works at an older opset, so it only sees opaque ops of the dialect's domain; `lower` gives them bodies,
# or their standard name where ONNX has one.
TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.qeff.cache_update.default: _opaque("CacheUpdate"),
    torch.ops.qeff.cache_positions.default: _opaque("CachePositions"),
    torch.ops.qeff.attention.default: _opaque("Attention", "scale", "softcap"),
    torch.ops.qeff.sink_attention.default: _opaque("SinkAttention", "scale", "softcap"),
    torch.ops.qeff.layer_input.default: _opaque("LayerInput"),
    torch.ops.qeff.layer_output.default: _opaque("LayerOutput"),
    torch.ops.qeff.state_window.default: _opaque("StateWindow"),
    torch.ops.qeff.state_next.default: _opaque("StateNext", "size"),
    torch.ops.qeff.every_token.default: _opaque("EveryToken"),
    torch.ops.qeff.spread_tokens.default: _opaque("SpreadTokens"),
    torch.ops.qeff.merge_rows.default: _opaque("MergeRows"),
    torch.ops.qeff.linear_attention.default: _opaque("LinearAttention", "delta"),
}
"""How torch's exporter translates each op."""
STANDARD = {"Attention"}
"""Ops of the dialect that ONNX has under the same name."""
