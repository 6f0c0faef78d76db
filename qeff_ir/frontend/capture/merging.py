"""Where rows of an encoder enter a language model: each such place is captured as one op.

Models put rows in the place of placeholder tokens by `torch.Tensor.masked_scatter`, which starts at row 0 in each run;
some add rows to the hidden states of a layer by ``x[mask] = x[mask] + rows``. Both become `MergeRows`, which knows the
row that a run begins with, so that a picture may span the chunks of a prompt. A branch on whether there is any
placeholder, or any other token that the configuration names, is taken; one on anything else is refused, as everywhere.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Generator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture.own_thread import replaced

Tensor = torch.Tensor

_EQUAL = (Tensor.__eq__, Tensor.eq, torch.eq)
_TOKEN = re.compile(r"_token_(ids?|index)$")
"""How configurations name tokens."""
_ANY = (Tensor.any, torch.any)
_SAME = (Tensor.to, Tensor.__or__)
"""What makes a mask of placeholders from masks of placeholders, views apart."""


class Merging(TorchFunctionMode):
    """Captures merges while the block lasts.

    Args:
        first: The row that the next placeholder stands for, int64 ``[batch, 1]``.
        count: Rows of each row of the batch.
        tokens: The placeholder, and others whose places a model may ask for.

    Attributes:
        next: `first` after the run; `None` until something was merged.
    """

    def __init__(self, first: Tensor, count: int, tokens: Collection[int] = ()) -> None:
        super().__init__()
        self.first, self.count, self.tokens = first, count, tokens
        self.next: Tensor | None = None
        self._masks: dict[int, Tensor] = {}  # of placeholders, by identity, and held
        self._anys: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def capturing(self) -> Generator[None]:
        """The block; transformers' own patches for export, which replace the method too, come before."""
        with replaced(Tensor, "masked_scatter", lambda _: self.merge), self:
            yield

    def merge(self, embeds: Tensor, mask: Tensor, rows: Any) -> Tensor:
        """`embeds` ``[batch, seq, width]`` with rows of each row of the batch, all after one another, at the mask."""
        chosen = _of_tokens(mask)
        self._masks[id(mask)] = mask
        if isinstance(rows, ChosenRows):
            return torch.where(chosen.unsqueeze(-1), rows.whole, embeds)
        own = rows.reshape(embeds.shape[0], self.count, embeds.shape[-1])
        merged, self.next = torch.ops.qeff.merge_rows(embeds, chosen, own, self.first)
        return merged

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.masked_scatter:
            return self.merge(*args, **(kwargs or {}))
        if func is Tensor.__bool__ and id(args[0]) in self._anys:
            return True  # "is there any placeholder?": what follows does nothing where there is none
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].dim() == 3:
            mask = _mask_of(args[1])
            if mask is not None and func is Tensor.__getitem__:
                return ChosenRows(args[0], mask, self, read=True)
            if mask is not None:
                held, _, value = args
                if isinstance(value, ChosenRows) or value.dim() == 2:
                    held.copy_(self.merge(held, mask, value))
                else:
                    at, numbers = mask, value.shape[0] if value.dim() == 1 else 0
                    if isinstance(numbers, int) and numbers == held.shape[-1]:
                        at = mask & (self.first <= self.count)  # beside rows: a run behind them does not write it
                    elif numbers:
                        value = value.reshape(held.shape)  # made of all tokens: see `ChosenRows.view`
                    held.copy_(torch.where(at.unsqueeze(-1), value, held))
                return None
        if func is Tensor.__setitem__ and _spread(*args):
            held, mask, value = args
            held.copy_(torch.where(mask, value.reshape(held.shape), held))
            return None
        out = func(*args, **(kwargs or {}))
        if func is Tensor.size and isinstance(out, torch.Size):
            return Sizes(out)
        if isinstance(out, Tensor) and out.dtype is torch.bool:
            self._note(func, args, out)
        return out

    def note(self, kinds: Tensor) -> None:
        """Know a tensor for one that tells what each token of the run is of."""
        self._masks[id(kinds)] = kinds

    def _is_mask(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what it is a view of, is a mask of placeholders."""
        base = tensor._base
        return id(tensor) in self._masks or (base is not None and id(base) in self._masks)

    def _note(self, func: Any, args: Any, out: Tensor) -> None:
        """Remember what tells where placeholders are, and whether there is one."""
        if func in _EQUAL and isinstance(args[1], int):
            if args[1] in self.tokens and not args[0].is_floating_point():
                self._masks[id(out)] = out
        elif args and all(self._is_mask(tensor) for tensor in args if isinstance(tensor, Tensor)):
            if func in _SAME:
                self._masks[id(out)] = out
            elif func in _ANY and len(args) == 1:
                self._anys[id(out)] = out


class ChosenRows:
    """``x[mask]`` while a model is traced: the vectors of the tokens that a mask chooses.

    How many there are, no trace can know. Rows that are added to them are added at the places of the tokens.
    """

    def __init__(self, whole: Tensor, mask: Tensor, merging: Merging, *, read: bool = False) -> None:
        self.whole, self.mask, self.merging, self.read = whole, mask, merging, read

    def __add__(self, rows: Tensor) -> ChosenRows:
        at_tokens = self.merging.merge(torch.zeros_like(self.whole), self.mask, rows)
        return ChosenRows(self.whole + at_tokens, self.mask, self.merging)

    __radd__ = __add__

    def _same(self, *_: Any, **__: Any) -> ChosenRows:
        return self

    clone = flatten = to = _same

    def view(self, *shape: int) -> Any:
        """Itself; of vectors as a model reads them, one a row, those of all tokens.

        What is made of these token by token is written at the tokens of a mask again, and nowhere else.
        """
        return self.whole.reshape(shape) if self.read and shape == (-1, self.whole.shape[-1]) else self

    reshape = view

    def numel(self) -> AsMany:
        """How many numbers there are, which models compare with the rows that they are given."""
        return AsMany()

    def __getattr__(self, name: str) -> Any:
        """Refuse.

        Raises:
            UnsupportedModelError: Always: only sums are understood.
        """
        raise UnsupportedModelError(
            f"the model chooses vectors of tokens by a mask and asks for their '{name}': only rows that are added to "
            "them are captured"
        )


class Sizes(tuple[Any, ...]):
    """The sizes of a tensor, as `torch.Size`, whose product of a size that may change fixes it."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Sizes(found) if isinstance(found, tuple) else found

    def numel(self) -> Any:
        """The product of all."""
        return math.prod(self)


class AsMany:
    """How many numbers a mask chooses: as many as rows bring, which the host sees to; nothing else is known of it."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _spread(held: Tensor, index: Any, value: Any) -> bool:
    """Whether numbers of all tokens are written at a mask of just their shape."""
    is_mask = isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() == held.dim() == 2
    return is_mask and isinstance(value, Tensor) and value.dim() == 1


def named_tokens(config: PreTrainedConfig) -> set[int]:
    """The tokens that a configuration names."""
    named = [value for name, value in config.to_dict().items() if _TOKEN.search(name)]
    listed = [value if isinstance(value, list) else [value] for value in named]
    return {token for tokens in listed for token in tokens if type(token) is int}


def _of_tokens(mask: Tensor) -> Tensor:
    """A mask of tokens, ``[batch, seq]``, from one that may have the axis of the vectors as well."""
    if mask.dim() == 2:
        return mask
    return mask.squeeze(-1) if mask.shape[-1] == 1 else mask[..., 0]


def _mask_of(index: Any) -> Tensor | None:
    """The mask in an index that chooses vectors of tokens; `None` for any other index."""
    if isinstance(index, tuple):
        rest: tuple[Any, ...] = index[1:]  # pyright: ignore[reportUnknownVariableType]
        index = index[0] if all(i is Ellipsis or i == slice(None) for i in rest) else None  # pyright: ignore[reportUnknownVariableType]
    if isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() in (2, 3):
        return _of_tokens(index)
    return None
