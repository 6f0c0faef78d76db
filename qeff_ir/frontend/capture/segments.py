"""Attention inside segments of one sequence: windows of a picture, or pictures that are packed into one sequence.

Towers split queries, keys and values, call attention once a segment, in each layer as often as there are windows, and
join what it makes. A trace has one attention of the whole instead: over a batch of segments where these are alike or
nearly, under a mask where few are long and many are short. Pieces that go elsewhere are pieces as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of ``[batch, heads, tokens, width]`` under a mask ``[1 or batch, 1, queries, keys]``, or none."""

_active: ContextVar[Segments | None] = ContextVar("segments", default=None)


class _Piece(NamedTuple):
    """What is known of a piece: itself, what it is one of, the lengths of all, which it is, and along which axis."""

    tensor: Tensor  # held, as pieces are known by identity
    whole: Tensor
    lengths: tuple[int, ...]
    place: int
    axis: int


class Segments(TorchFunctionMode):
    """Notes what is split for attention while the block lasts, and joins what attention makes of it.

    What is noted is split along the axis of tokens, ``[1, heads, tokens, width]`` into lengths.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pieces: dict[int, _Piece] = {}
        self._made: dict[Hashable, Sequence[Tensor]] = {}

    def __enter__(self) -> Self:
        self._before = _active.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.reset(self._before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")  # split and cat are there twice, and replaced in a trace
        if name == "cat":
            whole = self._joined(*args, **kwargs)
            return func(*args, **kwargs) if whole is None else whole
        made = func(*args, **kwargs)
        if name == "split" and len(args) > 1:
            lengths = _segmented(*args, **kwargs)
            if lengths is not None:
                self._note(made, args[0], lengths, 2)
        return made

    def attended(self, pieces: Sequence[Tensor], key: Hashable, attend: Attend) -> Tensor | None:
        """What attention makes of pieces of queries, keys and values; `None` where they were not split alike.

        Args:
            pieces: All three.
            key: What `attend` depends on beside them: the attention of the whole is computed once for each.
            attend: See `attention`.

        Returns:
            ``[1, tokens, heads, width]``, a piece.
        """
        known = [self._pieces[id(piece)] for piece in pieces if id(piece) in self._pieces]
        if len(known) < len(pieces) or len({(one.lengths, one.place, one.axis) for one in known}) > 1:
            return None
        whole, lengths = [one.whole for one in known], known[0].lengths
        which = (*map(id, whole), key)
        if which not in self._made:
            query, keys, values = whole
            out = attention(query, keys, values, lengths, attend).transpose(1, 2).contiguous()
            self._made[which] = out.split(lengths, dim=1)
            self._note(self._made[which], out, lengths, 1)
        return self._made[which][known[0].place]

    def _note(self, made: Sequence[Tensor], whole: Tensor, lengths: tuple[int, ...], axis: int) -> None:
        for place, tensor in enumerate(made):
            self._pieces[id(tensor)] = _Piece(tensor, whole, lengths, place, axis)

    def _joined(self, tensors: Any, dim: int = 0, **rest: Any) -> Tensor | None:
        """The whole of what attention has made, where just its pieces are put together again in their order."""
        known = [self._pieces.get(id(tensor)) for tensor in tensors]
        first = known[0] if known else None
        if first is None or rest or first.axis != 1 or dim not in (1, -3) or len(known) != len(first.lengths):
            return None
        same = all(p is not None and p.whole is first.whole and p.place == place for place, p in enumerate(known))
        return first.whole if same else None


def attended(query: Tensor, key: Tensor, value: Tensor, which: Hashable, attend: Attend) -> Tensor | None:
    """`Segments.attended` of the block that lasts; `None` outside of one."""
    active = _active.get()
    return None if active is None else active.attended((query, key, value), which, attend)


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
    lengths: tuple[Any, ...] = tuple(sizes)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    whole = tensor.shape[0] == 1 and all(isinstance(n, int) and n > 0 for n in lengths)  # pyright: ignore[reportUnknownVariableType]
    return lengths if whole and sum(lengths) == tensor.shape[2] else None
