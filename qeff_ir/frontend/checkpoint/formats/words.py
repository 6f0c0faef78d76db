"""Codes in words of 32 bits, of which a word holds several of one column or of one row, as codes of each output.

A checkpoint has its words as ``[in, out]``, a weight is ``[out, in]``: words are transposed in blocks that a
processor's caches hold, and bytes are made of them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError
from qeff_ir.quantized import SCALES, lazy
from qeff_ir.ranges import FileRange

_WORDS, _ROWS = 64, 1024
"""Columns and rows of a block."""
_LOW, _HIGH, _FOUR = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0), np.uint32(4)


def parts(entries: Mapping[str, FileRange], names: Sequence[str], where: str) -> list[FileRange]:
    """The tensors of one weight: words of 32 bits and scales, each with two axes.

    Args:
        entries: All tensors of the checkpoint.
        names: Whose are wanted; the scales come last.
        where: The configuration's file, for messages.

    Raises:
        ModelLoadError: One is missing, or is something else.
    """
    missing = next((name for name in names if name not in entries), None)
    if missing is not None:
        raise ModelLoadError(f"the checkpoint of {where} lacks '{missing}': download the model again")
    found = [entries[name] for name in names]
    for name, entry in zip(names, found, strict=True):
        types = SCALES if name == names[-1] else {ir.DataType.INT32}
        if entry.dtype not in types or len(entry.shape) != 2 or 0 in entry.shape:
            raise ModelLoadError(
                f"the tensor '{name}' of the checkpoint of {where} is {entry.dtype.name} {list(entry.shape)}, and not "
                f"{' or '.join(sorted(t.name for t in types))} with two axes: it is of a format that is not read"
            )
    return found


def misfit(name: str, entry: FileRange, shape: Sequence[int], where: str) -> ModelLoadError:
    """What to raise for a tensor whose sizes do not fit the codes."""
    return ModelLoadError(
        f"the tensor '{name}' of the checkpoint of {where} has shape {list(entry.shape)}, and the codes and "
        f"quantization_config ask for {list(shape)}: it is of another model, or of a format that is not read"
    )


def words(entry: FileRange) -> Array:
    """The words of a tensor, uint32, memory-mapped."""
    return entry.tensor("").numpy().view(np.uint32)


def transposed_scales(entry: FileRange, name: str) -> ir.LazyTensor:
    """Scales ``[groups, out]`` as ``[out, groups]``, of their own type."""
    return lazy(name, entry.dtype, (entry.shape[1], entry.shape[0]), lambda: entry.tensor("").numpy().T)


def transposed(packed: Array) -> Array:
    """Words ``[in, out]`` as ``[out, in]``."""
    made = np.empty(packed.shape[::-1], packed.dtype)
    for rows, columns in _blocks(packed):
        made[columns, rows] = packed[rows, columns].T
    return made


def spread(packed: Array, order: Sequence[int], bits: int) -> Array:
    """Words ``[rows, columns / (32 / bits)]`` as one code a byte, uint8 ``[columns, rows]``.

    Args:
        packed: The words, uint32.
        order: Which of its columns a word has in its lowest bits, in the next ones, and so on.
        bits: Of a code.
    """
    shifts = (np.argsort(order) * bits).astype(np.uint32)
    codes = (packed[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(len(packed), -1).T


def paired(packed: Array, order: Sequence[int]) -> Array:
    """Words ``[in, out / 8]`` of eight codes of a row, as bytes ``[out, in / 2]`` of two codes of a column.

    Args:
        packed: The words, uint32, of an even number of rows.
        order: See `spread`.
    """
    rows, columns = packed.shape
    made = np.empty((columns, 8, rows // 2), np.uint8)
    for chosen, several in _blocks(packed):
        block = np.ascontiguousarray(packed[chosen, several].T)
        first, second = block[:, 0::2], block[:, 1::2]
        places = slice(chosen.start // 2, chosen.stop // 2)
        # of eight codes in a word, the lower half of a byte has every other one: both halves come from one place
        for half, pairs in enumerate(
            [(first & _LOW) | ((second & _LOW) << _FOUR), ((first >> _FOUR) & _LOW) | (second & _HIGH)]
        ):
            lanes = pairs.view(np.uint8).reshape(*pairs.shape, 4)
            for lane in range(4):
                made[several, order[2 * lane + half], places] = lanes[..., lane]
    return made.reshape(columns * 8, rows // 2)


def _blocks(packed: Array) -> Iterator[tuple[slice, slice]]:
    rows, columns = packed.shape
    for row in range(0, rows, _ROWS):
        for column in range(0, columns, _WORDS):
            yield slice(row, min(row + _ROWS, rows)), slice(column, min(column + _WORDS, columns))
