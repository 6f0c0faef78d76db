"""Scales that lie in a grid over a matrix: one for all of it, for each row, or for each block of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.quantized import Quantized, lazy
from qeff_ir.ranges import FileRange

WORDS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E8M0})
"""Element types of scales; a byte is the exponent of a power of two, with a bias of 127."""


def gridded(key: str, codes: FileRange, scales: FileRange, block: Sequence[int] | None = None) -> Quantized | None:
    """The weight of which each block of rows and columns has a scale; `None` where the scales do not fit.

    Blocks of an ONNX weight lie along one axis, so that a scale of several rows is repeated for each of them. What does
    not have to be repeated stays in the file.

    Args:
        key: Of the weight.
        codes: ``[..., rows, columns]``.
        scales: One, or ``[..., rows of blocks, columns of blocks]``.
        block: Rows and columns of a block, of which the last may have fewer. Where it does not fit the number of
            scales, and where it is not given, all blocks are of one size.
    """
    *outer, rows, columns = codes.shape
    single = int(np.prod(scales.shape)) == 1
    grid = (*(1 for _ in outer), 1, 1) if single else scales.shape
    if len(grid) != len(codes.shape) or (not single and list(grid[:-2]) != outer) or 0 in (*codes.shape, *grid):
        return None
    high, wide = (_size(*sizes) for sizes in zip((rows, columns), grid[-2:], block or (0, 0), strict=True))
    if high is None or wide is None:
        return None
    if scales.dtype == ir.DataType.UINT8:
        scales = replace(scales, dtype=ir.DataType.FLOAT8E8M0)
    if scales.dtype not in WORDS:
        return None
    stored, shape = scales.tensor(key), (*outer, rows, grid[-1])
    if high == 1 and not single:
        return Quantized(codes.tensor(key), stored, None, len(shape) - 1, wide)

    def repeated() -> Array:
        numbers = stored.numpy().astype(np.float32).reshape(grid).repeat(high, axis=-2)[..., :rows, :]
        return np.broadcast_to(numbers, shape)

    return Quantized(codes.tensor(key), lazy(key, ir.DataType.FLOAT, shape, repeated), None, len(shape) - 1, wide)


def even(codes: FileRange, scales: FileRange, block: Sequence[int] | None = None) -> bool:
    """Whether all blocks of a weight that `gridded` reads are of one size."""
    if int(np.prod(scales.shape)) == 1:
        return True
    sizes = zip(codes.shape[-2:], scales.shape[-2:], block or (0, 0), strict=True)
    return all(count == 1 or (_size(size, count, asked) or 0) * count == size for size, count, asked in sizes)


def _size(size: int, count: int, asked: int) -> int | None:
    """Numbers of a block along one axis."""
    if asked > 0 and -(-size // asked) == count:
        return asked
    return None if size % count else size // count
