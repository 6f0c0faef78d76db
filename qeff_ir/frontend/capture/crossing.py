"""The cross-attention part of an encoder-decoder's cache: what a decoder's layers keep of the encoder's output.

transformers' decoders project the encoder's output once, put keys and values into this cache, and read them from there
ever after. So the cache tells, for any model, what passes from the encoder to the decoder: a run with an empty cache
shows it, and a run with a filled one computes none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from qeff_ir.ir.residents import Resident

Tensor = torch.Tensor

KINDS = ("cross-key", "cross-value")


class CrossCache(Cache):
    """Keys and values of the encoder's output, ``[batch, heads, encoder_ctx, width]`` for each layer.

    Args:
        past: Each state and its tensor; empty for a run that computes them.

    Attributes:
        made: What layers have stored, by layer: keys and values.
        used: Whether the model has an encoder.
    """

    def __init__(self, past: Mapping[Resident, Tensor]) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(1 + max((s.layer for s in past), default=-1))])
        self.past = dict(past)
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.used = False
        for state, tensor in past.items():
            layer: Any = self.layers[state.layer]
            layer.is_initialized = True
            setattr(layer, "keys" if state.kind == KINDS[0] else "values", tensor)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`; a layer stores once in a run."""
        self.made[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the encoder's output, for layers that have it; 0 for others."""
        found = next((t for s, t in self.past.items() if s.layer == layer_idx), None)
        return 0 if found is None else int(found.shape[2])

    def beside(self, cache: Cache) -> EncoderDecoderCache:
        """The cache of a whole model, with `cache` for the decoder's own tokens."""
        self.used = True
        return EncoderDecoderCache(cache, self)

    def found(self) -> list[Resident]:
        """What was stored, in the order of `Resident.order`."""
        return [
            Resident(layer, kind, ("batch_size", *(int(n) for n in tensor.shape[1:])), ir.DataType.FLOAT)
            for layer, tensors in sorted(self.made.items())
            for kind, tensor in zip(KINDS, tensors, strict=True)
        ]
