"""transformers' conversions of checkpoint tensors, as lazy tensors: a dry run says what they make, data comes later.

A conversion stacks, splits, joins or permutes the tensors of a checkpoint. One that only moves numbers is applied to
what the numbers are stored as: halves stay halves, and codes, scales and zeros of a quantized weight are moved each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
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
)

from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError, first_line
from qeff_ir.quantized import Quantized, dequantized, lazy, quantized
from qeff_ir.ranges import FileRange, widened
from qeff_ir.widening import HALVES

_MOVING = (Chunk, Concatenate, Interleave, MergeModulelist, PermuteForRope, Split, SplitModulelist, Transpose)
"""Operations of a conversion that compute nothing."""
_WHOLE = (Chunk, Concatenate, MergeModulelist, Split, SplitModulelist)
"""Those that leave the numbers along the last axis where they are, if they leave its size."""


class Loader:
    """Reads one tensor of the checkpoint when called; in a deep copy it stays the same reference.

    Args:
        source: The tensor: in a file, or made of several.
        key: Its name in the checkpoint.
        dtype: What is read is converted to.
    """

    def __init__(self, source: FileRange | ir.TensorProtocol, key: str, dtype: torch.dtype) -> None:
        self.source = source
        self.key = key
        self.dtype = dtype
        self.dry = False

    def __deepcopy__(self, memo: object) -> Loader:
        return Loader(self.source, self.key, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""
        return self.source.shape if isinstance(self.source, FileRange) else _sizes(self.source)

    @property
    def parts(self) -> Quantized | None:
        """What a quantized weight is made of."""
        return None if isinstance(self.source, FileRange) else quantized(self.source)

    def __call__(self) -> torch.Tensor:
        if self.dry:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        if not isinstance(self.source, FileRange):
            return torch.from_numpy(_plain(self.source)).to(self.dtype)
        try:
            with safe_open(self.source.file, framework="pt") as file:
                return file.get_tensor(self.key).to(self.dtype)
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(
                f"the checkpoint file {self.source.file} was changed or removed ({error}): open the model again"
            ) from error

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The tensor as the parameter of that name."""
        if not isinstance(self.source, FileRange):
            parts = self.parts
            return self.source if parts is None else dequantized(name, parts)
        if self.source.dtype == tensor_adapters.from_torch_dtype(self.dtype):
            return self.source.tensor(name)
        return widened(lazy_torch(name, self.source.shape, self.dtype, self), self.source.tensor(name))


@dataclass(frozen=True)
class _Made:
    """A tensor that a conversion makes: one on the meta device like it, and what computes it."""

    like: torch.Tensor
    load: Callable[[], torch.Tensor]

    def twice_as_wide(self, other: _Made) -> bool:
        """Whether the sizes are those of `other`, which has two numbers along the last axis for each."""
        *outer, last = self.like.shape
        return [*outer, 2 * last] == list(other.like.shape)

    def codes(self, name: str, dtype: ir.DataType, *, packed: bool = False) -> ir.TensorProtocol:
        """As a part of a quantized weight; `packed`: each byte holds two numbers of the last axis."""
        *outer, last = self.like.shape
        return lazy(name, dtype, (*outer, 2 * last if packed else last), lambda: self.load().numpy(), packed=packed)


def converted(model: PreTrainedModel, name: str, group: WeightConverter, folder: Path) -> dict[str, ir.TensorProtocol]:
    """The tensors that one conversion makes, by the names of the parameters.

    Args:
        model: A skeleton.
        name: The first parameter that the conversion is for.
        group: The conversion, with a `Loader` for each tensor that it takes.
        folder: Of the checkpoint, for messages.

    Raises:
        ModelLoadError: The tensors do not fit together.
    """
    loaders = [loader for several in _collected(group) for loader in several]
    if all(isinstance(operation, _MOVING) for operation in group.operations):
        parts = [loader.parts for loader in loaders]
        alike = _alike([p for p in parts if p is not None]) if None not in parts else None
        if alike is not None:
            moved = _moved(model, name, group, folder, alike)
            if moved is not None:
                return moved
        stored = {loader.source.dtype for loader in loaders}
        if len(stored) == 1 and stored <= HALVES:
            for loader in loaders:
                loader.dtype = tensor_adapters.to_torch_dtype(loader.source.dtype)
    made = _run(model, name, group, folder)
    return {target: floating(target, found.like, found.load) for target, found in made.items()}


def _collected(group: WeightConverter) -> Iterable[list[Loader]]:
    return cast("Iterable[list[Loader]]", group.collected_tensors.values())


def _run(model: PreTrainedModel, name: str, group: WeightConverter, folder: Path) -> dict[str, _Made]:
    dry = copy.deepcopy(group)
    for several in _collected(dry):
        for loader in several:
            loader.dry = True
    try:
        made: dict[str, Any] = dry.convert(name, model=model, config=model.config)
    except Exception as error:  # the conversions of many models raise whatever does not fit them
        raise ModelLoadError(
            f"the tensors in {folder} for '{name}' of {type(model).__name__} do not fit together "
            f"({first_line(error)}): the checkpoint is incomplete or of another model"
        ) from error

    def load(target: str) -> torch.Tensor:
        result: Any = copy.deepcopy(group).convert(name, model=model, config=model.config)[target]
        return (result[0] if isinstance(result, list) else result).contiguous()

    return {
        target: _Made(like[0] if isinstance(like, list) else like, lambda target=target: load(target))
        for target, like in made.items()
    }


def _alike(parts: Sequence[Quantized]) -> Quantized | None:
    """The first of weights whose parts are of the same types, with blocks of one size along the same axis."""
    kinds = {(p.codes.dtype, p.zeros is None, p.block, p.axis - len(p.shape)) for p in parts}
    return parts[0] if len(kinds) == 1 else None


def _moved(
    model: PreTrainedModel, name: str, group: WeightConverter, folder: Path, first: Quantized
) -> dict[str, ir.TensorProtocol] | None:
    """What a conversion makes of quantized weights, part by part; `None` where blocks would be torn apart."""
    if any(
        loader.shape[first.axis - len(first.shape)] % first.block for several in _collected(group) for loader in several
    ):
        return None

    def part(of: Callable[[Quantized], ir.TensorProtocol | None], dtype: torch.dtype) -> dict[str, _Made]:
        moving = copy.deepcopy(group)
        for several in _collected(moving):
            found = [of(cast("Quantized", loader.parts)) for loader in several]
            several[:] = [
                Loader(t, loader.key, dtype) for t, loader in zip(found, several, strict=True) if t is not None
            ]
        return _run(model, name, moving, folder)

    codes, scales = part(lambda p: p.codes, torch.uint8), part(lambda p: p.scales, torch.float32)
    zeros = None if first.zeros is None else part(lambda p: p.zeros, torch.uint8)
    pairs: dict[str, _Made] = {}
    even = first.codes.dtype.bitwidth == 4 and first.axis == len(first.shape) - 1 and first.block % 2 == 0
    if even and all(isinstance(operation, _WHOLE) for operation in group.operations):
        pairs = part(lambda p: _paired(p.codes), torch.uint8)
    made: dict[str, ir.TensorProtocol] = {}
    for target, found in codes.items():
        shape, blocks = found.like.shape, scales[target].like.shape
        axis = next((a for a, (size, count) in enumerate(zip(shape, blocks, strict=True)) if size != count), None)
        if axis is None:
            return None
        packed = target in pairs and pairs[target].twice_as_wide(found)
        parts = Quantized(
            (pairs[target] if packed else found).codes(target, first.codes.dtype, packed=packed),
            scales[target].codes(target, ir.DataType.FLOAT),
            None if zeros is None else zeros[target].codes(target, first.codes.dtype),
            axis,
            first.block,
        )
        if parts.problem() is not None or shape[axis] % first.block:
            return None
        made[target] = dequantized(target, parts)
    return made


def _paired(codes: ir.TensorProtocol) -> ir.TensorProtocol:
    """The bytes of codes of 4 bits, of which each holds two along the last axis."""
    *outer, last = _sizes(codes)
    shape = (*outer, last // 2)
    return lazy(
        codes.name or "", ir.DataType.UINT8, shape, lambda: np.frombuffer(codes.tobytes(), np.uint8).reshape(shape)
    )


def floating(name: str, like: torch.Tensor, load: Callable[[], torch.Tensor]) -> ir.TensorProtocol:
    """What `load` returns, a tensor like `like`; halves widened to float32."""
    shape = tuple(like.shape)
    made = lazy_torch(name, shape, like.dtype, load)
    wide = lazy_torch(name, shape, torch.float32, lambda: load().float())
    return widened(wide, made) if made.dtype in HALVES else made


def lazy_torch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], torch.Tensor]
) -> ir.LazyTensor:
    """A tensor that `load` returns when somebody asks for its numbers."""

    def evaluate() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(load(), name=name)

    return ir.LazyTensor(evaluate, tensor_adapters.from_torch_dtype(dtype), ir.Shape(shape), name=name)


def _sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor.shape.numpy())


def _plain(tensor: ir.TensorProtocol) -> Array:
    """The numbers of a tensor, or the bits of its codes: torch has no type for most of them."""
    array = np.array(tensor.numpy())
    if tensor.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT8E8M0):
        return array.astype(np.float32)
    return array if tensor.dtype.is_floating_point() and tensor.dtype.bitwidth > 8 else array.view(np.uint8)
