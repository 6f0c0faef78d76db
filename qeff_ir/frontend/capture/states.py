"""The cache handed to a model while it is traced: every kind of layer state that transformers knows, as ops.

A first, probing run without states records which tensors each layer keeps; the traced run gets these as inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture.crossing import CrossCache
from qeff_ir.ir.residents import DimValue, Resident

Tensor = torch.Tensor
Key = tuple[str, int]
"""Kind and index of a tensor in its layer."""


class _Held:
    """The tensors of one layer: the shapes that a probing run shows, or the values of a traced run."""

    def __init__(self, position_ids: Tensor, past: Mapping[Key, Tensor], count: int) -> None:
        self.position_ids = position_ids
        self.count = count
        self.past = dict(past)
        self.now = dict(past)
        self.seen: dict[Key, tuple[DimValue, ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        """Of the copy of a layer, which holds nothing yet: models that run a layer again put it into the cache."""
        return _Held(self.position_ids, {}, self.count)

    def append(self, key: Key, new: Tensor) -> Tensor:
        """Store tokens ``[batch, heads, seq, width]``; all that the cache holds, ``[batch, heads, ctx, width]``."""
        if key not in self.past:
            self.seen[key] = ("batch_size", _size(new, 1), "ctx_len", _size(new, 3))
            return new
        self._expect(key, new, 1, 3)
        self.now[key] = torch.ops.qeff.cache_update(self.now[key], new, self.position_ids)
        return self.now[key]

    def slide(self, key: Key, new: Tensor, size: int) -> Tensor:
        """Append tokens ``[batch, channels, seq]`` to the last `size` ones: ``[batch, channels, size + seq]``."""
        if key not in self.past:
            self.seen[key] = ("batch_size", _size(new, 1), size)
            return torch.cat([new.new_zeros((*new.shape[:2], size)), new], dim=-1)
        self._expect(key, new, 1)
        if _size(self.past[key], 2) != size:
            raise _differs(key)
        window = torch.ops.qeff.state_window(self.past[key], new, self.position_ids)
        self.now[key] = torch.ops.qeff.state_next(window, self.position_ids, size)
        return window

    def replace(self, key: Key, new: Tensor) -> Tensor:
        """Store a whole state, whose shape has no token axis."""
        if key not in self.past:
            self.seen[key] = ("batch_size", *(_size(new, axis) for axis in range(1, new.dim())))
        else:
            self._expect(key, new, *range(1, new.dim()))
        self.now[key] = new
        return new

    def _expect(self, key: Key, new: Tensor, *axes: int) -> None:
        """Refuse what does not go with the state that there was."""
        past = self.past[key]
        if past.dim() != new.dim() or any(_size(past, axis) != _size(new, axis) for axis in axes):
            raise _differs(key)


def _differs(key: Key) -> UnsupportedModelError:
    return UnsupportedModelError(f"a layer keeps a {key[0]} state of one shape in one run and of another in the next")


def _channels(tensor: Tensor) -> int:
    """How many numbers are stored for each token."""
    return _size(tensor, 1) * _size(tensor, 3)


def _size(tensor: Tensor, axis: int) -> int:
    return int(tensor.shape[axis])


_NOTHING = torch.zeros(0)
"""What a layer holds before it has held anything: models ask for its size."""


class AttentionLayer(DynamicIndexedLayer):
    """Keys and values of all tokens, or of a window; an indexer's keys where there are any."""

    def __init__(self, window: int | None, held: _Held, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_sliding = window is not None
        self.window = window
        self.held = held
        self.is_initialized = True
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.keys, self.values = held.past.get(("key", 0), _NOTHING), held.past.get(("value", 0), _NOTHING)

    @property
    def slots(self) -> Tensor | None:
        """The key cache, whose length is the number of slots; `None` in the probing run."""
        return self.held.past.get(("key", 0))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer.update`."""
        if not _channels(key_states):
            self.values, self.keys = self._halved(value_states, key_states)
        elif not _channels(value_states):
            self.keys, self.values = self._halved(key_states, value_states)
        else:
            self.keys = self.held.append(("key", 0), key_states)
            self.values = self.held.append(("value", 0), value_states)
        return self.keys, self.values

    def _halved(self, new: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Store tokens beside which there is nothing to store: one half as keys, and one as values.

        A cache is a pair on every device, and nothing without channels can be retained.
        """
        size = _size(new, 3) - _size(new, 3) // 2
        halves = new.split([size, _size(new, 3) - size], dim=-1)
        stored = [self.held.append((kind, 0), half) for kind, half in zip(("key", "value"), halves, strict=True)]
        whole = torch.cat(stored, dim=-1)
        return whole, whole.new_zeros((whole.shape[0], empty.shape[1], whole.shape[2], empty.shape[3]))

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """See `DynamicIndexedLayer.update_indexer`; ``[batch, seq, width]`` in, ``[batch, ctx, width]`` out."""
        return self.held.append(("indexer", 0), indexer_key_states.unsqueeze(1)).squeeze(1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of slots; they start at 0."""
        return (query_length if self.slots is None else self.slots.shape[2]), 0

    def get_seq_length(self) -> int:
        """See `CapturingCache.get_seq_length`."""
        return self.held.count

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionLayer:
        return AttentionLayer(self.window, copy.deepcopy(self.held, memo))


class RecurrentLayer(LinearAttentionLayer):
    """Convolution windows and recurrent states; there is a previous state from the first token on (zero)."""

    def __init__(self, held: _Held, number_of_states: int = 1, **kwargs: Any) -> None:
        super().__init__(number_of_states=number_of_states)
        self.held = held
        self.has_previous_state = dict.fromkeys(range(number_of_states), bool(held.past))
        for index in range(number_of_states):
            self.conv_states[index] = held.past.get(("conv", index))
            self.recurrent_states[index] = held.past.get(("recurrent", index))

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """See `LinearAttentionLayer.update_conv_state`."""
        key: Key = ("conv", state_idx)
        if conv_kernel_size is None:
            raise UnsupportedModelError(
                "a layer cuts its convolution's window by itself, so that padding would end up in it"
            )
        return self.held.slide(key, conv_states, conv_kernel_size)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """See `LinearAttentionLayer.update_recurrent_state`."""
        return self.held.replace(("recurrent", state_idx), recurrent_states)

    def __deepcopy__(self, memo: dict[int, Any]) -> RecurrentLayer:
        return RecurrentLayer(copy.deepcopy(self.held, memo), self.number_of_states)


class HybridLayer(RecurrentLayer, AttentionLayer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Both in one layer."""

    def __init__(self, window: int | None, held: _Held, number_of_states: int = 1) -> None:
        AttentionLayer.__init__(self, window, held)
        RecurrentLayer.__init__(self, held, number_of_states)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridLayer:
        return HybridLayer(self.window, copy.deepcopy(self.held, memo), self.number_of_states)


Layer = AttentionLayer | RecurrentLayer | HybridLayer | DummyLayer


class CapturingCache(Cache):
    """The cache handed to a model while it is traced.

    Args:
        model: The model; its configuration says which layer kinds there are.
        position_ids: ``[batch, seq]``, -1 for padding.
        past: Each state and its tensor; empty for the probing run that finds them.
        count: How many tokens the cache says that it holds: a symbol of the traced run, by which
            `qeff_ir.frontend.export.counts` knows what a model makes from it.

    Attributes:
        cross: What the layers keep of an encoder's output.

    Raises:
        UnsupportedModelError: The model has layers whose state is of an unknown kind.
    """

    def __init__(
        self, model: PreTrainedModel, position_ids: Tensor, past: Mapping[Resident, Tensor], count: int = 0
    ) -> None:
        self.captured = _layers(model, position_ids, {s: t for s, t in past.items() if s.update != "once"}, count)
        self.cross = CrossCache({s: t for s, t in past.items() if s.update == "once"})
        self.count = count
        super().__init__(layers=cast("list[Any]", self.captured))  # one list: a model may add layers while it runs
        self.position_ids = position_ids
        self.of_run: Tensor | None = None
        """Where masks look things up by the position of a token: 1 for positions of this run, ``[batch, ctx]``."""
        self.masks: list[Tensor] = []
        """Those that were made for it."""
        self.mask_layer = 0
        self.recurrent: Tensor | None = None
        self.recurrent_calls = 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """As in transformers; also notes which layer the next mask is for."""
        self.mask_layer = layer_idx
        if not isinstance(self.captured[layer_idx], AttentionLayer):
            attention = [i for i, layer in enumerate(self.captured) if isinstance(layer, AttentionLayer)]
            if not attention:
                return query_length, 0
            self.mask_layer = attention[0]
        layer = self.attention_layer()
        if self.of_run is not None:
            layer = self.whole_layer()
        return (query_length, 0) if layer is None else layer.get_mask_sizes(query_length)

    def whole_layer(self) -> AttentionLayer:
        """A layer without a window, which has a slot for each position.

        Raises:
            UnsupportedModelError: Every layer has a window.
        """
        layers = [layer for layer in self.captured if isinstance(layer, AttentionLayer)]
        whole = next((layer for layer in layers if layer.window is None), None)
        if whole is None:
            raise UnsupportedModelError(
                "masks depend on which tokens are of a picture, and each layer has a window: no cache tells how long "
                "the context is"
            )
        return whole

    @property
    def is_initialized(self) -> bool:
        """Whether a model is to take a run for a later one than the prompt; a graph of pictures is that of a prompt."""
        return self.of_run is None and super().is_initialized

    def attention_layer(self) -> AttentionLayer | None:
        """The layer that the next mask is for; `None` when no layer has attention."""
        layer = self.captured[self.mask_layer]
        return layer if isinstance(layer, AttentionLayer) else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """A number to be told apart from all others: positions are given, not counted."""
        return self.count

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """As in transformers; also notes the state that the next recurrence starts from."""
        self.recurrent, self.recurrent_calls = super().get_recurrent_state(layer_idx, state_idx), 0
        return self.recurrent

    def next_recurrent(self) -> Tensor | None:
        """The state that a kernel starts from; counts the kernels that a layer calls with one state."""
        self.recurrent_calls += 1
        return self.recurrent

    def found(self) -> list[Resident]:
        """What was stored, after a probing run, in the order of `Resident.order`."""
        states = [
            Resident(i, kind, shape, ir.DataType.FLOAT, _window(layer) if "ctx_len" in shape else None, index=number)
            for i, layer in enumerate(self.captured)
            if not isinstance(layer, DummyLayer)
            for (kind, number), shape in layer.held.seen.items()
        ]
        states += self.cross.found()
        return sorted(states, key=lambda s: s.order)

    def result(self, state: Resident) -> Tensor:
        """The tensor of one state after a traced run."""
        if state in self.cross.past:
            return self.cross.past[state].clone()  # an output of its own
        layer = self.captured[state.layer]
        assert not isinstance(layer, DummyLayer)
        return layer.held.now[state.kind, state.index]


def _window(layer: Layer) -> int | None:
    return layer.window if isinstance(layer, AttentionLayer) else None


def _layers(model: PreTrainedModel, position_ids: Tensor, past: Mapping[Resident, Tensor], count: int) -> list[Layer]:
    by_layer: dict[int, dict[Resident, Tensor]] = {}
    for state, tensor in past.items():
        by_layer.setdefault(state.layer, {})[state] = tensor
    # transformers has a configuration of the decoder's own where the two differ.
    decoder: Any = model.get_decoder() if model.config.is_encoder_decoder else model
    config: Any = getattr(decoder, "config", model.config)
    kinds = DynamicCache(config=config).layers
    number = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    layers: list[Layer] = []
    for kind in kinds or [DynamicLayer() for _ in range(number)]:
        held = _held(position_ids, by_layer.get(len(layers), {}), count)
        linear = isinstance(kind, LinearAttentionCacheLayerMixin)
        window = int(kind.sliding_window) if isinstance(kind, DynamicSlidingWindowLayer) else None
        # A subclass of a model's own keeps something else, or keeps it otherwise.
        ours = type(kind).__module__ == DynamicLayer.__module__
        if ours and isinstance(kind, DummyLayer):
            layers.append(kind)
        elif ours and linear and isinstance(kind, DynamicLayer):
            layers.append(HybridLayer(window, held, kind.number_of_states))
        elif ours and linear:
            layers.append(RecurrentLayer(held, kind.number_of_states))
        elif type(kind) in (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer):
            layers.append(AttentionLayer(window, held))
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps a {type(kind).__name__} state in layer {len(layers)}, a kind of its own "
                "that cannot be retained"
            )
    # Those that the model added in the run that showed the states; it adds none where they are there already.
    for index in range(len(layers), max(by_layer, default=-1) + 1):
        layers.append(_added(position_ids, by_layer.get(index, {}), count))
    return layers


def _held(position_ids: Tensor, past: Mapping[Resident, Tensor], count: int) -> _Held:
    return _Held(position_ids, {(state.kind, state.index): tensor for state, tensor in past.items()}, count)


def _added(position_ids: Tensor, past: Mapping[Resident, Tensor], count: int) -> Layer:
    """A layer of the kind that keeps these states."""
    held, window = _held(position_ids, past, count), next((s.window for s in past if s.window is not None), None)
    recurrent = [state.index for state in past if not state.has_slots]
    if len(recurrent) == len(past):
        return RecurrentLayer(held, 1 + max(recurrent, default=0))
    return HybridLayer(window, held, 1 + max(recurrent)) if recurrent else AttentionLayer(window, held)
