"""From the model's parameter names to the checkpoint's tensors.

transformers renames, stacks, splits and permutes tensors while it loads. A rename stays a reference into the
checkpoint; a change of layout or of element type becomes a lazy tensor, computed when it is written, one at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    SplitModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qeff_ir.errors import ModelLoadError, first_line
from qeff_ir.frontend.checkpoint.references import Checkpoint
from qeff_ir.frontend.checkpoint.skeleton import initial_values
from qeff_ir.frontend.checkpoint.ties import tie
from qeff_ir.frontend.private import ignored_when_missing
from qeff_ir.ranges import FileRange, widened
from qeff_ir.widening import HALVES

_MOVING = (Chunk, Concatenate, Interleave, MergeModulelist, PermuteForRope, Split, SplitModulelist, Transpose)
"""Operations of a conversion that compute nothing."""

Weights = dict[str, ir.TensorProtocol]
"""Parameter or persistent buffer name to its tensor."""


def checkpoint_weights(model: PreTrainedModel, checkpoint: Checkpoint, *, partial: bool = False) -> Weights:
    """Find every parameter and persistent buffer of `model` in the checkpoint, as transformers would load them.

    Args:
        model: A skeleton; its names are wanted. Weights that the checkpoint unties are untied in it.
        checkpoint: Where to look.
        partial: Whether parameters may be missing.

    Raises:
        ModelLoadError: A parameter is missing or has another shape, or the tensors of several cannot be made one.
    """
    wanted = model.state_dict()
    weights: Weights = {}
    for name, found in _collected(model, wanted, checkpoint).items():
        if isinstance(found, _Loader):
            weights[name] = _typed(found, name)
        else:
            weights.update({n: t for n, t in _converted(model, name, found, checkpoint).items() if n in wanted})
    _check_shapes(wanted, weights, checkpoint)
    tie(model, weights)
    if missing := _missing(model, weights):
        weights.update(_computed(model, missing))
        missing = [name for name in missing if name not in weights]
    if missing and not partial:
        raise ModelLoadError(
            f"{checkpoint.folder} lacks {len(missing)} tensors of {type(model).__name__}, the first is "
            f"'{min(missing, key=dot_natural_key)}': the checkpoint is incomplete or of another model"
        )
    return weights


def _collected(
    model: PreTrainedModel, wanted: dict[str, torch.Tensor], checkpoint: Checkpoint
) -> dict[str, _Loader | WeightConverter]:
    """What becomes of the checkpoint's tensors: the one that is a parameter, or those that a conversion makes it of.

    Names are found in transformers' own order, which tells what is stacked first, and which of two tensors for one
    parameter is taken: the first.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, _Loader | WeightConverter] = {}
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        loader = _Loader(checkpoint.entries[key], key, wanted[name].dtype)
        group = found.setdefault(name, loader if pattern is None else copy.deepcopy(by_pattern[pattern]))
        if isinstance(group, WeightConverter):
            group.add_tensor(name, key, key if pattern is None else pattern, loader)  # pyright: ignore[reportArgumentType]
    return found


def memory_weights(model: PreTrainedModel) -> Weights:
    """The parameters and persistent buffers of a model in memory, shared, not copied (floats become float32)."""
    weights: Weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        data = tensor.detach()
        if data.is_meta:
            raise ModelLoadError(f"parameter '{name}' of the model has no data (it is on the meta device)")
        if data.dtype in (torch.float16, torch.bfloat16):
            weights[name] = _float(name, data, lambda data=data: data.contiguous())
        elif data.is_floating_point() and data.dtype != torch.float32:
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
        try:
            with safe_open(self.entry.file, framework="pt") as file:
                return file.get_tensor(self.key).to(self.dtype)
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(
                f"the checkpoint file {self.entry.file} was changed or removed ({error}): open the model again"
            ) from error


def _converted(model: PreTrainedModel, name: str, group: WeightConverter, checkpoint: Checkpoint) -> Weights:
    """The tensors that one conversion makes, found by a dry run without data.

    Halves stay halves where it only moves numbers.
    """
    collected = cast("Iterable[list[_Loader]]", group.collected_tensors.values())
    loaders = [loader for several in collected for loader in several]
    stored = {loader.entry.dtype for loader in loaders}
    if len(stored) == 1 and stored <= HALVES and all(isinstance(operation, _MOVING) for operation in group.operations):
        for loader in loaders:
            loader.dtype = tensor_adapters.to_torch_dtype(loader.entry.dtype)
    dry = copy.deepcopy(group)
    for loaders in dry.collected_tensors.values():
        for loader in loaders:
            loader.dry = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        made: dict[str, Any] = dry.convert(name, model=model, config=model.config)
    except Exception as error:  # the conversions of many models raise whatever does not fit them
        raise ModelLoadError(
            f"the tensors in {checkpoint.folder} for '{name}' of {type(model).__name__} do not fit together "
            f"({first_line(error)}): the checkpoint is incomplete or of another model"
        ) from error

    def load(target: str) -> torch.Tensor:
        result: Any = copy.deepcopy(group).convert(name, model=model, config=model.config)[target]
        return result[0] if isinstance(result, list) else result

    weights: Weights = {}
    for target, shape_only in made.items():
        like = shape_only[0] if isinstance(shape_only, list) else shape_only
        weights[target] = _float(target, like, lambda target=target: load(target).contiguous())
    return weights


def _float(name: str, like: torch.Tensor, load: Callable[[], torch.Tensor]) -> ir.TensorProtocol:
    """What `load` returns, a tensor like `like`; halves widened to float32."""
    made, shape = _lazy(name, tuple(like.shape), like.dtype, load), tuple(like.shape)
    return widened(_lazy(name, shape, torch.float32, lambda: load().float()), made) if made.dtype in HALVES else made


def _typed(loader: _Loader, name: str) -> ir.TensorProtocol:
    entry = loader.entry
    if entry.dtype == _ir_dtype(loader.dtype):
        return entry.tensor(name)
    return widened(_lazy(name, entry.shape, loader.dtype, loader), entry.tensor(name))


def _lazy(name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(load(), name=name)

    return ir.LazyTensor(evaluate, _ir_dtype(dtype), ir.Shape(shape), name=name)


def _ir_dtype(dtype: torch.dtype) -> ir.DataType:
    return tensor_adapters.from_torch_dtype(dtype)


def _check_shapes(wanted: dict[str, torch.Tensor], weights: Weights, checkpoint: Checkpoint) -> None:
    for name, tensor in weights.items():
        shape = tuple(tensor.shape.numpy())
        if shape != tuple(wanted[name].shape):
            raise ModelLoadError(
                f"tensor '{name}' in {checkpoint.folder} has shape {list(shape)}, the configuration asks for "
                f"{list(wanted[name].shape)}: the weights belong to another configuration"
            )


def _missing(model: PreTrainedModel, weights: Weights) -> list[str]:
    """Parameters that have no tensor, and buffers that are expected to have none."""
    saved = model.state_dict().keys()
    parameters = [name for name, _ in model.named_parameters() if name not in weights]
    buffers = [name for name, _ in model.named_buffers() if name in saved and name not in weights]
    return parameters + _expected(model, buffers)


def _computed(model: PreTrainedModel, missing: list[str]) -> Weights:
    """Of missing tensors those that transformers expects to be missing, and always gives the same values."""
    names = _expected(model, missing)
    return {n: _Shared(tensor, name=n) for n, tensor in initial_values(model, names).items()} if names else {}


def _expected(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Those that transformers expects to be missing; its patterns are of the whole model's names."""
    patterns = ignored_when_missing(model)
    prefix = f"{model.base_model_prefix}."
    return [n for n in names if any(re.search(p, n) or re.search(p, prefix + n) for p in patterns)]
