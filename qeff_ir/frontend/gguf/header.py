"""What a GGUF file says of itself, checked as a whole before any library reads it: they take its counts at their word.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian; magic, version, counts, pairs of keys
and values, a table of tensors, and their bytes).
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.ranges import FileRange
from qeff_ir.reading import MAX_SIDE_FILE_BYTES, regular_file

PLAIN = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
"""Types that hold numbers, and not blocks of codes with their scales."""

_VERSIONS = (2, 3)
_ARCHITECTURE, _ALIGNMENT = "general.architecture", "general.alignment"
_TOKENS = "tokenizer.ggml.tokens"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the values of fixed size, by the number of their type."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MOST_DIMS = 4
_LONGEST_KEY = 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        kind: Its type as GGUF spells it: ``F32``, ``Q4_0``, ….
        where: Its bytes: the numbers of a plain type, or uint8 ``[..., bytes of a row]`` for blocks.
        shape: Sizes in numbers, the first one that of the rows.
    """

    kind: str
    where: FileRange
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file.

    Attributes:
        path: The real path.
        architecture: The name of the architecture, as llama.cpp has it.
        has_tokenizer: Whether it holds a vocabulary.
        tensors: By name, in the order of the file.
    """

    path: Path
    architecture: str
    has_tokenizer: bool
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path, root: Path | None = None) -> GgufFile:
    """Read and check the header of a GGUF file; no tensor is read.

    Args:
        path: The file.
        root: Folder that it must stay in, links followed; its own when not given.

    Raises:
        ModelLoadError: It is no GGUF file, is damaged or truncated, or the package ``gguf`` is missing.
        UnsupportedModelError: It has a version, a type or a value that is not supported.
    """
    require_gguf(path)
    real = regular_file(path, root)
    try:
        with real.open("rb") as file:
            return _Header(file, real).read()
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not a whole GGUF file ({error}): download it again") from error


def require_gguf(path: Path) -> None:
    """Say what to install where the package ``gguf`` is missing.

    Raises:
        ModelLoadError: It is.
    """
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ModelLoadError(
            f"{path} is a GGUF file, which the package gguf reads: pip install 'qeff-ir[gguf]' ({error})"
        ) from error


@functools.cache
def _types() -> dict[int, tuple[str, int, int]]:
    """The types by number: name, numbers of a block, and bytes of it."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class _Header:
    """Walks a file from its start; a count is compared with the bytes that are left before it is used."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.whole = path.stat().st_size
        self.left = min(self.whole, MAX_SIDE_FILE_BYTES)

    def read(self) -> GgufFile:
        """See `read_gguf`."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, pairs = self._take("<IQQ")
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                f"{self.path} is a GGUF file of version {version} (in this byte order), versions 2 and 3 are read: "
                "convert the model again"
            )
        values: dict[str, tuple[int, object]] = {}
        for _ in range(self._counted(pairs, 13)):
            key = self._string(_LONGEST_KEY)
            if key in values:
                raise ValueError(f"the key {key!a:.80} is there twice")
            (kind,) = self._take("<I")
            values[key] = kind, self._value(kind)
        table = [self._info() for _ in range(self._counted(tensors, 25))]
        architecture, alignment = values.get(_ARCHITECTURE), values.get(_ALIGNMENT, (_UINT32, 32))
        if architecture is None or not isinstance(architecture[1], str):
            raise ValueError(f"it has no {_ARCHITECTURE}")
        if alignment[0] != _UINT32 or not isinstance(alignment[1], int) or alignment[1].bit_count() != 1:
            raise ValueError(f"{_ALIGNMENT} is no power of two")
        start = -(-self.file.tell() // alignment[1]) * alignment[1]
        found: dict[str, GgufTensor] = {}
        for name, sizes, kind, offset in table:
            if name in found:
                raise ValueError(f"the tensor {name!a:.80} is there twice")
            found[name] = self._tensor(name, sizes, kind, start + offset)
        return GgufFile(self.path, architecture[1], _TOKENS in values, found)

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(self._counted(count, 1))
        if len(data) != count:
            raise ValueError("it ends within its header")
        self.left -= count
        return data

    def _take(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _counted(self, count: int, least: int) -> int:
        """A count of things of at least so many bytes each, which have to fit what is left."""
        if count * least > self.left:
            raise ValueError(f"{count:,} of something are said to follow in its header, which has no room for them")
        return count

    def _string(self, most: int) -> str:
        (length,) = self._take("<Q")
        if length > most:
            raise ValueError(f"a text of {length:,} bytes is too long for its place")
        return self._bytes(length).decode()

    def _value(self, kind: int) -> object:
        """A value; of one that is not looked at here, `None`."""
        if kind == _UINT32:
            return self._take("<I")[0]
        if kind == _STRING:
            return self._string(MAX_SIDE_FILE_BYTES)
        if kind == _ARRAY:
            inner, count = self._take("<IQ")
            if inner == _STRING:
                for _ in range(self._counted(count, 8)):
                    self._string(_LONGEST_KEY)
            elif inner in _SIZES:
                self._bytes(count * _SIZES[inner])
            else:
                raise UnsupportedModelError(
                    f"{self.path} holds an array of values of type {inner}, which is not supported: convert the model "
                    "again"
                )
            return None
        if kind not in _SIZES:
            raise ValueError(f"a value has the type {kind}, which does not exist")
        self._bytes(_SIZES[kind])
        return None

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_LONGEST_KEY)
        (dims,) = self._take("<I")
        if not 0 < dims <= _MOST_DIMS:
            raise ValueError(f"the tensor {name!a:.80} has {dims} sizes")
        sizes = self._take(f"<{dims}Q")
        kind, offset = self._take("<IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, start: int) -> GgufTensor:
        sizes = _types().get(number)
        if sizes is None:
            raise UnsupportedModelError(
                f"the tensor '{name:.80}' of {self.path} has the type {number}, which the installed package gguf does "
                "not know: upgrade gguf, or convert the model to Q8_0"
            )
        kind, block, size = sizes
        length = math.prod(shape) // block * size
        if shape[-1] % block or 0 in shape or start + length > self.whole:
            raise ValueError(f"the tensor {name!a:.80} of {kind} {list(shape)} does not fit the file")
        plain = PLAIN.get(kind)
        stored = shape if plain is not None else (*shape[:-1], shape[-1] // block * size)
        dtype = ir.DataType.UINT8 if plain is None else plain
        return GgufTensor(kind, FileRange(self.path, start, length, dtype, stored, linkable=True), shape)
