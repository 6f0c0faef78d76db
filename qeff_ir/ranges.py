"""Tensors that lie in files, as ranges of bytes, and those that a file has in another element type."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.digests import digest_file
from qeff_ir.errors import PackageError

_META_KEY = "qeff.range"
_NARROW_KEY = "qeff.narrow"


@dataclass(frozen=True, slots=True)
class FileRange:
    """A tensor in a file.

    Attributes:
        file: Absolute path, symbolic links resolved.
        offset: First byte.
        length: Bytes.
        dtype: Element type as stored.
        shape: Sizes.
        linkable: Whether the file may get a further hard link: it is a checkpoint's, and not an ONNX file's.
    """

    file: Path
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]
    linkable: bool = field(default=False, compare=False)

    def tensor(self, name: str) -> ir.LazyTensor:
        """An initializer value that is read (memory-mapped) only when somebody asks for its numbers.

        `onnx_ir.ExternalTensor` is not used here because it refuses to read files that have several hard links, which
        a checkpoint and a large package made of it may be.
        """

        def read() -> ir.TensorProtocol:
            if self.length == 0:  # nothing that could be mapped
                return ir.Tensor(np.zeros(self.shape, self.dtype.numpy()), dtype=self.dtype, name=name)
            try:
                data = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.length,))
            except (OSError, ValueError) as error:
                raise PackageError(
                    f"the weight file {self.file} is gone or too short ({error}): restore it, or open the model again"
                ) from error
            if self.dtype.bitwidth < 8:
                return ir.PackedTensor(data, self.dtype, shape=self.shape, name=name)
            return ir.Tensor(data.view(self.dtype.numpy()).reshape(self.shape), dtype=self.dtype, name=name)

        tensor = ir.LazyTensor(read, self.dtype, ir.Shape(self.shape), name=name)
        tensor.meta[_META_KEY] = self
        return tensor


def file_range(tensor: ir.TensorProtocol | None) -> FileRange | None:
    """Where a tensor made by `FileRange.tensor` lies, or `None` for any other tensor."""
    return tensor.meta.get(_META_KEY) if isinstance(tensor, ir.LazyTensor) else None


def widened(tensor: ir.LazyTensor, source: ir.TensorProtocol) -> ir.LazyTensor:
    """The tensor, marked as the numbers of `source`, which has another element type."""
    tensor.meta[_NARROW_KEY] = source
    return tensor


def narrow(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """What a `widened` tensor has its numbers of, or `None` for any other tensor."""
    return tensor.meta.get(_NARROW_KEY) if isinstance(tensor, ir.LazyTensor) else None


def stored(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """The numbers of a tensor; memory-mapped, and in the element type of the file, where they lie in one."""
    return (narrow(tensor) or tensor).numpy()


def stored_in(tensor: ir.TensorProtocol | None) -> FileRange | None:
    """Where `stored` takes the numbers of a tensor from; `None` for memory."""
    return file_range(narrow(tensor) or tensor)


def numbers_digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 of the numbers of a tensor as float32, whatever they are stored as; in a file, taken once."""
    where = stored_in(tensor)
    if where is None:
        return hashlib.sha256(np.ascontiguousarray(tensor.numpy(), dtype=np.float32).tobytes()).hexdigest()
    dtype = where.dtype.numpy()

    def widen(data: bytes) -> bytes:
        return np.frombuffer(data, dtype).astype(np.float32).tobytes()

    return digest_file(where.file, where.offset, where.length, (f"{where.dtype.name} as float32", widen))
