"""Into how many blocks an attention is cut, and where the blocks end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import OpBuilder

BUDGET = 6 * 2**20
"""Bytes of a block: three quarters of the 8 MiB that a core of the AI 100 holds beside it (contract §3)."""
_HALF = 2
"""Bytes of a number on the device."""


@dataclass(frozen=True)
class Extent:
    """What an attention goes over, at most, in any specialization.

    Attributes:
        batch: Rows.
        kv_heads: Key/value heads.
        group: Query heads of each.
        queries: Tokens of a run, in each specialization.
        keys: Slots that are read, in each specialization.
        widths: Of a key and a value together.
    """

    batch: int
    kv_heads: int
    group: int
    queries: frozenset[int]
    keys: frozenset[int]
    widths: int

    def block_bytes(self, heads: int, queries: int, keys: int) -> int:
        """Scores, keys and values of the largest block in half precision."""
        h = -(-self.kv_heads // heads)
        q, k = -(-max(self.queries) // queries), -(-max(self.keys) // keys)
        return _HALF * self.batch * h * k * (self.group * q + self.widths)


Counts = tuple[int, int, int]
"""Blocks of heads, of queries and of keys."""


def fitting(extent: Extent, given: Sequence[int | None], budget: int = BUDGET) -> Counts:
    """The least numbers of blocks with which the largest fits the budget.

    Heads are cut first, which costs nothing; then queries; and keys last. No axis has more blocks than the shortest
    specialization has entries on it.

    Args:
        extent: Of the attention.
        given: Blocks of heads, queries and keys where they are chosen already; `None` where they are not.
        budget: Bytes of a block.
    """
    most = extent.kv_heads, min(extent.queries), min(extent.keys)
    counts = [1 if count is None else min(count, limit) for count, limit in zip(given, most, strict=True)]
    for axis, limit in enumerate(most):
        for count in _candidates(limit) if given[axis] is None else ():
            counts[axis] = count
            if extent.block_bytes(*counts) <= budget:
                break
    return counts[0], counts[1], counts[2]


def _candidates(limit: int) -> list[int]:
    """1 to 4 by 1, then twice as many each time, up to a limit (contract §3)."""
    steps = [1, 2, 3, *itertools.takewhile(lambda count: count < limit, (4 << shift for shift in range(31)))]
    return [*(count for count in steps if count < limit), limit]


def sizes(module: Module, dim: int | ir.SymbolicDim) -> frozenset[int]:
    """The sizes that specializations give an axis; none where one of them gives none."""
    if isinstance(dim, int):
        return frozenset({dim})
    found = frozenset(s.symbols.get(str(dim.value), 0) for s in module.specializations)
    return frozenset() if 0 in found else found


@dataclass(frozen=True)
class Block:
    """A part of an axis, or all of it.

    Attributes:
        ends: Where it begins, and where the next does, ``[1]`` each; `None` for all of the axis.
        size: Its length; `None` where specializations differ, or for all.
    """

    ends: tuple[ir.Value, ir.Value] | None = None
    size: int | None = None

    def of(self, value: ir.Value, axis: int, b: OpBuilder) -> ir.Value:
        """The part of a value along an axis; all of it where it has one entry for all, or no such axis (below 0)."""
        if self.ends is None or axis < 0 or value.shape is None or value.shape[axis] == 1:
            return value
        dims = value.shape.dims
        shape = [*dims[:axis], self.size, *dims[axis + 1 :]]
        return b("Slice", value, *self.ends, b.const([axis]), shape=shape, dtype=value.dtype)


def bounds(length: int, count: int) -> list[int]:
    """Where the blocks begin, and where the last ends: their sizes differ by one at most."""
    return [index * length // count for index in range(count + 1)]


def blocks(
    count: int, lengths: frozenset[int], b: OpBuilder, of: ir.Value, axis: int, together: int = 1
) -> list[Block]:
    """The blocks of an axis.

    Args:
        count: Blocks.
        lengths: Of the axis, in each specialization.
        b: Where they are written.
        of: A value with the axis, to ask for the length where specializations differ.
        axis: The axis there.
        together: Entries that stay together, as the query heads of a group; `lengths` counts groups.
    """
    if count == 1:
        return [Block()]
    if len(lengths) == 1:
        ends = [together * end for end in bounds(min(lengths), count)]
        return [Block((b.const([i]), b.const([j])), j - i) for i, j in itertools.pairwise(ends)]
    length = b("Shape", of, start=axis, end=axis + 1)
    found = [b("Div", b("Mul", length, b.const([index])), b.const([count])) for index in range(count + 1)]
    return [Block(ends) for ends in itertools.pairwise(found)]
