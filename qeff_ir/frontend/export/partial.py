"""Partial evaluation while an encoder is traced: what follows from the geometry of its input alone is a constant.

Towers compute positions, windows and splits from the sizes of pictures. At one size these are constants, and so is all
that follows from them: a function of real tensors alone is called for real, and the trace sees its result.

What comes from the pixels of the example alone has a *shadow* as well, its value on the example, until a weight comes
in or is written into it: a Python number, a length or a choice of rows that depends on it is that of the example.
So a tower that drops pictures without content is one for pictures with content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.private import storage_of, version_of, without_modes

Tensor = torch.Tensor

_FACTORIES = frozenset({torch.arange, torch.linspace, torch.tensor})
"""What makes numbers of numbers; other factories make room, which the trace keeps unless it is for whole numbers."""

_ASK = frozenset(
    {Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__float__}
    | {torch.nonzero, Tensor.nonzero, torch.unique, Tensor.unique, torch.unique_consecutive}
    | {torch.repeat_interleave, Tensor.repeat_interleave, torch.bincount}
)
"""What asks for numbers, or makes a length of them."""


_SIZED = frozenset(
    {"view", "reshape", "expand", "repeat", "narrow", "split", "split_with_sizes", "interpolate", "pad", "unflatten"}
)
"""What takes sizes behind the tensor that it works on."""


_WRITES = frozenset(
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"}
    | {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)
"""What writes, of the methods that operators call."""


class PartialEvaluation(TorchFunctionMode):
    """Computes what is known while the block lasts; everything else is traced.

    Args:
        examples: Values of inputs of the trace, by the tensors that stand for them.
    """

    def __init__(self, examples: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        # By identity, and held: another tensor at the same address would be taken for it.
        own = {tensor: _compute(value.clone, (), {}) for tensor, value in examples.items()}  # written into
        self._shadows: dict[int, tuple[Tensor, Tensor]] = {id(t): (t, value) for t, value in own.items()}
        self._constants: dict[int, tuple[Tensor, int, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if all(type(tensor) is Tensor for tensor in tensors):
            return self._real(func, args, kwargs, any_tensor=bool(tensors))
        written = _written(func, args, kwargs)
        if type(written) is Tensor:
            raise UnsupportedModelError(
                "the encoder writes what it makes of its input into a tensor of numbers that are known before "
                f"({getattr(func, '__name__', func)}): make the tensor of the input's type, or choose by torch.where"
            )
        args, kwargs = pytree.tree_map(self._as_it_is, (args, kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._chosen(args[1]), *args[2:])
        elif getattr(func, "__name__", "") in _SIZED:
            args, kwargs = pytree.tree_map(_number, (args[1:], kwargs))
            args = (leaves[0], *args)
        unknown = any(self._value(tensor) is None for tensor in tensors)
        if written is not None:
            if unknown:
                self._forget(written)
            else:
                _compute(func, *pytree.tree_map(self._value, (args, kwargs)))
            return func(*args, **kwargs)
        if unknown:
            return func(*args, **kwargs)
        known_args, known_kwargs = pytree.tree_map(self._value, (args, kwargs))
        if func in _ASK:
            return _compute(func, known_args, known_kwargs)
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") != "__get__":
            self._shade(out, _compute(func, known_args, known_kwargs))
        return out

    def _real(self, func: Callable[..., Any], args: Any, kwargs: Any, *, any_tensor: bool) -> Any:
        """The result of a function of real tensors; of numbers alone, where it makes numbers."""
        if not any_tensor and func not in _FACTORIES and not _makes_whole_numbers(func, kwargs):
            return func(*args, **kwargs)
        return _compute(func, args, kwargs)

    def _value(self, leaf: Any) -> Any:
        """What an argument is on the example; `None` for a tensor of which that is not known."""
        if not isinstance(leaf, Tensor) or type(leaf) is Tensor:
            return leaf
        found = self._shadows.get(id(leaf))
        return None if found is None else found[1]

    def _shade(self, made: Any, value: Any) -> None:
        for one, known in zip(pytree.tree_leaves(made), pytree.tree_leaves(value), strict=True):
            if isinstance(one, Tensor) and isinstance(known, Tensor) and type(one) is not Tensor:
                self._shadows[id(one)] = one, known

    def _as_it_is(self, leaf: Any) -> Any:
        """A real tensor as it is now: the trace holds it as it is, and the model may write into it later."""
        if type(leaf) is not Tensor:
            return leaf
        found = self._constants.get(id(leaf))
        if found is None or found[1] != version_of(leaf):
            found = self._constants[id(leaf)] = leaf, version_of(leaf), _compute(leaf.clone, (), {})
        return found[2]

    def _forget(self, written: Tensor) -> None:
        """Drop the value of a tensor that is written, and of all that share its memory."""
        memory = storage_of(written)
        self._shadows = {key: held for key, held in self._shadows.items() if storage_of(held[0]) != memory}

    def _chosen(self, index: Any) -> Any:
        """An index whose masks, where they are known, have become the places that they choose."""
        parts: tuple[Any, ...] = cast("tuple[Any, ...]", index) if isinstance(index, tuple) else (index,)
        parts = tuple(self._slice(part) if isinstance(part, slice) else part for part in parts)
        index = parts if isinstance(index, tuple) else parts[0]
        masks = [part for part in parts if isinstance(part, Tensor) and part.dtype is torch.bool]
        if not masks or any(self._value(mask) is None for mask in masks):
            return index
        found: list[Any] = []
        for part in parts:
            known = self._value(part)
            is_mask = isinstance(known, Tensor) and known.dtype is torch.bool
            found += _compute(torch.nonzero, (known,), {"as_tuple": True}) if is_mask else [part]
        return tuple(found)

    def _slice(self, given: slice) -> slice:
        """A slice whose bounds, where they are known, are numbers."""
        bounds = (given.start, given.stop, given.step)
        known = [bound if self._value(bound) is None else _number(self._value(bound)) for bound in bounds]
        return slice(*known)


def _number(leaf: Any) -> Any:
    """A whole number in a real tensor without axes as one of Python."""
    if type(leaf) is not Tensor or leaf.dim() or leaf.is_floating_point():
        return leaf
    return _compute(leaf.item, (), {})


def _compute(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with without_modes():
        return func(*args, **kwargs)


def _makes_whole_numbers(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a factory fills a tensor that cannot hold weights or activations."""
    named = getattr(func, "__name__", "") in ("zeros", "ones", "full", "empty")
    dtype = kwargs.get("dtype")
    return named and isinstance(dtype, torch.dtype) and not dtype.is_floating_point


def _written(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a function changes, its first argument or ``out``; `None` for a function that changes none."""
    name = getattr(func, "__name__", "")
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
        return args[0]
    return kwargs.get("out")
