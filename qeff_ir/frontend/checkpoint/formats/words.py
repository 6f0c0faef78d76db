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

_EXCHANGES = {
    1: (np.uint32(4), np.uint32(0x0F0F0F0F)),
    2: (np.uint32(8), np.uint32(0x00FF00FF)),
    4: (np.uint32(16), np.uint32(0x0000FFFF)),
}
"""How far two rows of codes are apart that exchange bits, by how many they are shifted, and which they are."""


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
    for rows, columns in _blocks(packed, 64, 64):
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


def streamed(packed: Array, bits: int) -> Array:
    """Words ``[rows, words]`` as one code a byte, uint8 ``[rows, words * 32 / bits]``.

    Codes follow one another from the lowest bits of the first word on; of 3 bits, some lie in two words.

    Args:
        packed: The words, uint32; whole codes fill the words of a row.
        bits: Of a code.
    """
    rows, columns = packed.shape
    made = np.empty((rows, columns * 32 // bits), np.uint8)
    values = (1 << np.arange(bits)).astype(np.uint8)
    for start in range(0, rows, _ROWS):
        several = np.ascontiguousarray(packed[start : start + _ROWS], "<u4").view(np.uint8)
        single = np.unpackbits(several, axis=1, bitorder="little")
        made[start : start + _ROWS] = single.reshape(len(several), -1, bits) @ values
    return made


_ROWS = 64
"""Rows whose bits are taken apart together: a byte holds one for a moment."""


def paired(packed: Array, order: Sequence[int]) -> Array:
    """Words ``[in, out / 8]`` of eight codes of a row, as bytes ``[out, in / 2]`` of two codes of a column.

    Eight words of a column are eight by eight codes, which are transposed by exchanging halves, quarters and eighths
    of words: H. S. Warren, Hacker's Delight, "Transposing a bit matrix".

    Args:
        packed: The words, uint32, of a number of rows that eight divides.
        order: See `spread`.
    """
    rows, columns = packed.shape
    made = np.empty((columns, 8, rows // 8), np.uint32)
    for chosen, several in _blocks(packed, 1024, 128):
        eight = [packed[chosen, several][row::8].copy() for row in range(8)]
        for step, (shift, mask) in _EXCHANGES.items():
            for row in range(8):
                if not row & step:
                    first, second = eight[row], eight[row + step]
                    moved = ((first >> shift) ^ second) & mask
                    second ^= moved
                    first ^= moved << shift
        for place, codes in zip(order, eight, strict=True):
            made[several, place, slice(chosen.start // 8, chosen.stop // 8)] = codes.T
    return made.view(np.uint8).reshape(columns * 8, rows // 2)


def _blocks(packed: Array, high: int, wide: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that fit into a processor's caches."""
    rows, columns = packed.shape
    for row in range(0, rows, high):
        for column in range(0, columns, wide):
            yield slice(row, min(row + high, rows)), slice(column, min(column + wide, columns))
