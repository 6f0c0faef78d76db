"""Attention inside segments of one sequence: windows of a picture, or pictures that are packed into one sequence.

Towers split queries, keys and values and call attention once a segment, in each layer as often as there are windows. A
trace keeps the three whole, and there is one attention: over a batch of segments where these are alike or nearly, under
a mask where few are long and many are short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of ``[batch, heads, tokens, width]`` under a mask ``[1 or batch, 1, queries, keys]``, or none."""

_SPLIT = (torch.split, Tensor.split)
_active: ContextVar[Segments | None] = ContextVar("segments", default=None)


class Segments(TorchFunctionMode):
    """Keeps whole what is split for attention, while the block lasts.

    What is split along the axis of tokens, ``[1, heads, tokens, width]`` into lengths, becomes one part, which
    `attention` knows again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marked: dict[int, tuple[Tensor, tuple[int, ...]]] = {}  # by identity, and held
        self._taken: set[int] = set()

    def __enter__(self) -> Self:
        self._before = _active.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.reset(self._before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SPLIT:
            found = _segmented(*args, **kwargs)
            if found is not None:
                whole = args[0].view(args[0].shape)  # a tensor of its own: the other may go elsewhere
                self._marked[id(whole)] = whole, found
                return (whole,)
        return func(*args, **kwargs)

    @property
    def all_taken(self) -> bool:
        """Whether all that was kept whole went into attention."""
        return self._taken == set(self._marked)

    def lengths(self, *tensors: Tensor) -> tuple[int, ...] | None:
        """The lengths of the segments of queries, keys and values; `None` where they were not split alike."""
        found = {self._marked[id(tensor)][1] if id(tensor) in self._marked else None for tensor in tensors}
        if len(found) > 1 or None in found:
            return None
        self._taken |= {id(tensor) for tensor in tensors}
        return found.pop()


def lengths_of(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...] | None:
    """The lengths of the segments inside which tokens see one another; `None` for one sequence."""
    active = _active.get()
    return None if active is None else active.lengths(query, key, value)


def attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], attend: Attend) -> Tensor:
    """Attention inside segments.

    Args:
        query: ``[1, heads, tokens, width]``.
        key: ``[1, kv_heads, tokens, width]``.
        value: As `key`.
        lengths: Of the segments, one after the other.
        attend: Attention of one sequence, or of a batch of them.

    Returns:
        ``[1, heads, tokens, width]``.
    """
    count, longest, total = len(lengths), max(lengths), sum(lengths)
    if count * longest**2 > total**2:  # as a batch, short segments would be filled up to the longest
        segment = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))
        return attend(query, key, value, (segment[:, None] == segment)[None, None])
    places = torch.zeros((count, longest), dtype=torch.long)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    places[inside] = torch.arange(total)
    alike = bool(inside.all())

    def batched(tensor: Tensor) -> Tensor:
        filled = tensor if alike else tensor.index_select(2, places.flatten())
        return filled.reshape(tensor.shape[1], count, longest, tensor.shape[3]).transpose(0, 1)

    mask = None if alike else inside[:, None, None, :].expand(-1, -1, longest, -1)
    out = attend(batched(query), batched(key), batched(value), mask)
    joined = out.transpose(0, 1).reshape(1, query.shape[1], count * longest, -1)
    return joined if alike else joined.index_select(2, inside.flatten().nonzero()[:, 0])


def _segmented(tensor: Tensor, sizes: Any, dim: int = 0) -> tuple[int, ...] | None:
    """Lengths into which the tokens of one sequence are split; `None` for another split."""
    if not isinstance(sizes, list | tuple) or len(sizes) < 2 or tensor.dim() != 4 or dim not in (2, -2):  # pyright: ignore[reportUnknownArgumentType]
        return None
    lengths = tuple(sizes)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    whole = tensor.shape[0] == 1 and all(isinstance(n, int) and n > 0 for n in lengths)  # pyright: ignore[reportUnknownVariableType]
    return lengths if whole and sum(lengths) == tensor.shape[2] else None
