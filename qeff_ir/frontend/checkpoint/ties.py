"""Which weights of a model are one: transformers decides it from the checkpoint, while it loads.

A configuration says which weights are to be tied. Of two that the checkpoint has with other numbers, both stay; of two
of which it has one, either one is the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from qeff_ir.frontend import private
from qeff_ir.ranges import file_range, stored

_CHUNK = 1 << 20
"""Elements that are compared at a time."""


def tie(model: PreTrainedModel, weights: dict[str, ir.TensorProtocol]) -> None:
    """Tie and untie as transformers does when it has loaded a checkpoint, in place.

    Args:
        model: A skeleton, whose weights are tied as its configuration says. Those that are not tied after all get
            parameters of their own.
        weights: What the checkpoint has, by name; names that are tied to others are added.
    """
    _share_modules(model, weights)
    tied: dict[str, str] = model.all_tied_weights_keys or {}
    pairs = list(tied.items())
    for index, (target, source) in enumerate(pairs):
        if target in weights and source in weights:
            if not same_numbers(weights[target], weights[source]):
                _untie(model, target)
                tied.pop(target)
                continue
        elif target in weights:  # the one that is there is the source, whichever the model calls so
            target, source = source, target
        elif source not in weights:
            others = (name for name, base in pairs[index + 1 :] if base == source and name in weights)
            source = next(others, source)
        if source in weights:
            weights[target] = weights[source]


def same_numbers(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    """Whether two tensors are equal in shape, element type and all numbers; read in pieces, up to the first difference.

    As `torch.equal` has it: zeros are equal whatever their sign, and what is not a number equals nothing.
    """
    if one is other or (file_range(one) is not None and file_range(one) == file_range(other)):
        return True
    if one.dtype != other.dtype or tuple(one.shape.numpy()) != tuple(other.shape.numpy()):
        return False
    left, right = (stored(tensor).reshape(-1) for tensor in (one, other))
    dtype = one.dtype.numpy()
    return all(
        np.array_equal(left[start : start + _CHUNK].astype(dtype), right[start : start + _CHUNK].astype(dtype))
        for start in range(0, len(left), _CHUNK)
    )


def _share_modules(model: PreTrainedModel, weights: dict[str, ir.TensorProtocol]) -> None:
    """Where one module stands in two places, what is loaded for one place, the last one, is there in the other too."""
    places: dict[tuple[int, str], list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for table in private.tensor_tables(module):
            for name in table:
                places.setdefault((id(module), name), []).append(f"{path}.{name}" if path else name)
    order = {name: index for index, name in enumerate(weights)}
    for names in places.values():
        loaded = sorted((n for n in names if n in order), key=order.__getitem__)
        if len(names) > 1 and loaded:
            weights.update(dict.fromkeys(names, weights[loaded[-1]]))


def _untie(model: PreTrainedModel, name: str) -> None:
    parent, _, own = name.rpartition(".")
    module: Any = model.get_submodule(parent)
    old = module.get_parameter(own)
    new = torch.nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
    private.mark_initialized(new, True)
    setattr(module, own, new)
