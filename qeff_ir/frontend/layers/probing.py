"""Which states a model keeps between tokens: what its layers store in the cache when it is run on fake tensors.

Layers of one structure are expected to keep the same, so that one of them is run. The run that tells which layers are
copies of each other (`qeff_ir.frontend.layers.kinds`) starts from these states, and fails where a layer keeps others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DummyLayer

from qeff_ir.frontend.capture.states import CapturingCache
from qeff_ir.frontend.layers.kinds import cut, layer_lists, members
from qeff_ir.ir.residents import Resident

Run = Callable[[CapturingCache], Any]
"""Runs the model on fake tensors with a cache."""


def probe(model: PreTrainedModel, run: Run, position_ids: torch.Tensor) -> list[Resident]:
    """The states that a run of the model shows, in the order of `Resident.order`; none when it writes to no cache.

    Args:
        model: The model, its weights fake tensors.
        run: Runs it.
        position_ids: Positions of that run, ``[batch, seq]``.

    Raises:
        UnsupportedModelError: A layer's state is of an unknown kind. What the model's own code raises is left as it is.
    """
    cache = CapturingCache(model, position_ids, {})
    run(cache)
    return cache.found()


def expect(model: PreTrainedModel, run: Run, position_ids: torch.Tensor) -> list[Resident] | None:
    """The states that are to be expected once a layer of each structure has run; `None` when that does not tell.

    Args:
        model: As for `probe`.
        run: As for `probe`; it may fail for want of layers.
        position_ids: As for `probe`.
    """
    path = next(iter(layer_lists(model)), None)
    if path is None:
        return None
    firsts: dict[Any, int] = {}
    try:
        cache = CapturingCache(model, position_ids, {})
        structures = [(type(k), *structure(m)) for k, m in zip(cache.captured, members(model, path), strict=True)]
        stands = [firsts.setdefault(key, index) for index, key in enumerate(structures)]
        with cut(model, path, sorted(firsts.values())):
            run(cache)
    except Exception:  # whatever a model's code raises that finds fewer layers than it looks for
        return None
    added = len(cache.captured) > len(stands)
    if added or any(state.layer not in firsts.values() for state in cache.found()):
        return None
    for layer, index in zip(cache.captured, stands, strict=True):
        first = cache.captured[index]
        if not isinstance(layer, DummyLayer) and not isinstance(first, DummyLayer):
            layer.held.seen = first.held.seen
    return cache.found()


def structure(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What a layer is made of, whatever its weights are."""
    parameters = layer.named_parameters(remove_duplicate=False)
    return tuple((n, type(m)) for n, m in layer.named_modules()), tuple((n, tuple(p.shape)) for n, p in parameters)
