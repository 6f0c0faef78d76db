"""Which tensors follow from others, while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Tensor = torch.Tensor


class Following(TorchFunctionMode):
    """Notes which tensors follow from some while the block lasts; ``tensor in following`` tells.

    Args:
        start: Those that others follow from.
    """

    def __init__(self, start: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = {id(tensor): tensor for tensor in start}  # by identity, and held

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(leaf in self for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)):
            self._held |= {id(leaf): leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)}
        return out
