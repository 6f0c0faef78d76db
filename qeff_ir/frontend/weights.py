"""From the model's parameter names to the checkpoint's tensors.

transformers renames, stacks, splits and permutes tensors while it loads. A rename stays a reference into the
checkpoint; a change of layout or of element type becomes a lazy tensor, computed when it is written, one at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.checkpoint import Checkpoint
from qeff_ir.storage import FileRange, widened

Weights = dict[str, ir.TensorProtocol]
"""Parameter or persistent buffer name to its tensor."""


def checkpoint_weights(model: PreTrainedModel, checkpoint: Checkpoint, *, partial: bool = False) -> Weights:
    """Find every parameter and persistent buffer of `model` in the checkpoint.

    Args:
        model: Its names are wanted.
        checkpoint: Where to look.
        partial: Whether parameters may be missing.

    Raises:
        ModelLoadError: A parameter is missing or has another shape.
    """
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix

    weights: Weights = {}
    groups: dict[str, WeightConverter] = {}
    for key in sorted(checkpoint.entries, key=_natural):
        entry = checkpoint.entries[key]
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            weights[name] = _typed(entry, key, name, wanted[name].dtype)
        else:
            group = groups.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            group.add_tensor(name, key, pattern, _Loader(entry, key, wanted[name].dtype))  # pyright: ignore[reportArgumentType]
    for name, group in groups.items():
        weights.update(_converted(model, name, group))
    _check(model, wanted, weights, checkpoint, partial)
    return weights


def memory_weights(model: PreTrainedModel) -> Weights:
    """The parameters and persistent buffers of a model in memory, shared, not copied (floats become float32)."""
    weights: Weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        data = tensor.detach()
        if data.is_meta:
            raise ModelLoadError(f"parameter '{name}' of the model has no data (it is on the meta device)")
        if data.is_floating_point() and data.dtype != torch.float32:
            weights[name] = _lazy(name, tuple(data.shape), torch.float32, lambda data=data: data.float())
        else:
            weights[name] = _Shared(data.contiguous(), name=name)
    return weights


class _Shared(tensor_adapters.TorchTensor):
    """A tensor of the user's model: its numbers can be read, and written by nobody."""

    def numpy(self) -> np.ndarray[Any, Any]:
        """A read-only view."""
        view = super().numpy().view()
        view.flags.writeable = False
        return view


class _Loader:
    """Reads one tensor of the checkpoint when called; in a deep copy it stays the same reference."""

    def __init__(self, entry: FileRange, key: str, dtype: torch.dtype) -> None:
        self.entry = entry
        self.key = key
        self.dtype = dtype
        self.dry = False

    def __deepcopy__(self, memo: object) -> _Loader:
        return _Loader(self.entry, self.key, self.dtype)

    def __call__(self) -> torch.Tensor:
        if self.dry:
            return torch.empty(self.entry.shape, dtype=self.dtype, device="meta")
        with safe_open(self.entry.file, framework="pt") as file:
            return file.get_tensor(self.key).to(self.dtype)


def _converted(model: PreTrainedModel, name: str, group: WeightConverter) -> Weights:
    """The tensors that one conversion makes, found by a dry run without data."""
    dry = copy.deepcopy(group)
    for loaders in dry.collected_tensors.values():
        for loader in loaders:
            loader.dry = True  # pyright: ignore[reportAttributeAccessIssue]
    made: dict[str, Any] = dry.convert(name, model=model, config=model.config)

    def load(target: str) -> torch.Tensor:
        result: Any = copy.deepcopy(group).convert(name, model=model, config=model.config)[target]
        return result[0] if isinstance(result, list) else result

    weights: Weights = {}
    for target, shape_only in made.items():
        like = shape_only[0] if isinstance(shape_only, list) else shape_only
        weights[target] = _lazy(target, tuple(like.shape), like.dtype, lambda target=target: load(target).contiguous())
    return weights


def _typed(entry: FileRange, key: str, name: str, dtype: torch.dtype) -> ir.TensorProtocol:
    if entry.dtype == _ir_dtype(dtype):
        return entry.tensor(name)
    return widened(_lazy(name, entry.shape, dtype, _Loader(entry, key, dtype)), entry)


def _lazy(name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(load(), name=name)

    return ir.LazyTensor(evaluate, _ir_dtype(dtype), ir.Shape(shape), name=name)


def _ir_dtype(dtype: torch.dtype) -> ir.DataType:
    return tensor_adapters.from_torch_dtype(dtype)


def _natural(key: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _check(
    model: PreTrainedModel, wanted: dict[str, torch.Tensor], weights: Weights, checkpoint: Checkpoint, partial: bool
) -> None:
    for name, tensor in weights.items():
        shape = tuple(tensor.shape.numpy())
        if name in wanted and shape != tuple(wanted[name].shape):
            raise ModelLoadError(
                f"tensor '{name}' in {checkpoint.folder} has shape {list(shape)}, the configuration asks for "
                f"{list(wanted[name].shape)}: the weights belong to another configuration"
            )
    for one, other in (model.all_tied_weights_keys or {}).items():
        if one in weights or other in weights:
            weights.setdefault(one, weights.get(other, weights.get(one)))  # pyright: ignore[reportArgumentType]
            weights.setdefault(other, weights[one])
    missing = [name for name, _ in model.named_parameters() if name not in weights]
    if missing and not partial:
        raise ModelLoadError(
            f"{checkpoint.folder} lacks {len(missing)} tensors of {type(model).__name__}, the first is "
            f"'{min(missing, key=_natural)}': the checkpoint is incomplete or of another model"
        )
