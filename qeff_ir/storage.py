"""Tensors that stay in their files, and writing a model to a folder without copying them.

A weight is a range of bytes in a file. Files of a checkpoint are hard-linked into a package; tensors that exist nowhere
yet are written once, one at a time.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import PackageError
from qeff_ir.package import digest_file

WEIGHTS = "weights"
"""Folder of the weight files, beside the ONNX file; ONNX takes only paths below its own folder."""

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the ONNX file, as constants do in the AI 100 contract (§8)."""

_META_KEY = "qeff.range"
_STORED_KEY = "qeff.stored"
_CHUNK = 1 << 24
_UNLINKABLE = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES})
"""What a file system answers that cannot link to a file: it is another one, has no hard links, or no more of them."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """A tensor in a file.

    Attributes:
        file: Absolute path, symbolic links resolved.
        offset: First byte.
        length: Bytes.
        dtype: Element type as stored.
        shape: Sizes.
    """

    file: Path
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    def tensor(self, name: str) -> ir.LazyTensor:
        """An initializer value that is read (memory-mapped) only when somebody asks for its numbers.

        `onnx_ir.ExternalTensor` is not used here because it refuses to read files that have several hard links, which
        is just what a checkpoint and the packages made of it are.
        """

        def read() -> ir.Tensor[Any]:
            data = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.length,))
            return ir.Tensor(data.view(self.dtype.numpy()).reshape(self.shape), dtype=self.dtype, name=name)

        tensor = ir.LazyTensor(read, self.dtype, ir.Shape(self.shape), name=name)
        tensor.meta[_META_KEY] = self
        return tensor


def file_range(tensor: ir.TensorProtocol | None) -> FileRange | None:
    """Where a tensor made by `FileRange.tensor` lies, or `None` for any other tensor."""
    return tensor.meta.get(_META_KEY) if isinstance(tensor, ir.LazyTensor) else None


def widened(tensor: ir.LazyTensor, stored_as: FileRange) -> ir.LazyTensor:
    """The tensor, marked as the numbers of `stored_as` in a wider element type (see `stored`)."""
    tensor.meta[_STORED_KEY] = stored_as
    return tensor


def stored(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """The numbers of a tensor; memory-mapped, and in the element type of the file, where they lie in one."""
    where: FileRange | None = tensor.meta.get(_STORED_KEY) if isinstance(tensor, ir.LazyTensor) else None
    return (tensor if where is None else where.tensor(tensor.name or "")).numpy()


def load_model(path: Path) -> ir.Model:
    """Read an ONNX file whose weights stay where they are, as `save_model` wrote it.

    Raises:
        PackageError: A tensor lies outside the file's own folder, or its file is missing or too short.
    """
    model = ir.load(path)
    root = path.parent.resolve()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = (root / tensor.location).resolve()
        if not file.is_relative_to(root):
            raise PackageError(f"{path} refers to '{tensor.location}', outside its own folder: refused")
        start, length = tensor.offset or 0, tensor.length or tensor.nbytes
        if not file.is_file() or file.stat().st_size < start + length:
            raise PackageError(f"{file}, a weight file of {path}, is missing or too short: compile again")
        shape = tuple(int(d) for d in tensor.shape.numpy())
        value.const_value = FileRange(file, start, length, tensor.dtype, shape).tensor(value.name or "")
    return model


def save_model(model: ir.Model, folder: Path, filename: str) -> None:
    """Write ``folder/filename`` and what it refers to under ``folder/weights``; `model` itself is unchanged.

    Tensors that lie in files are referenced through a hard link, or a copy where the folder is on another file system.
    All others above 1 KiB go to one side file, one at a time.

    Raises:
        PackageError: A referenced file is gone.
    """
    copy = model.clone()
    links: dict[Path, str] = {}
    loose: list[ir.Value] = []
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        where = file_range(tensor)
        if where is not None:
            value.const_value = ir.ExternalTensor(
                link(where.file, folder, links),
                where.offset,
                where.length,
                where.dtype,
                shape=ir.Shape(where.shape),
                name=value.name or "",
                base_dir=folder,
            )
        elif tensor is not None and tensor.nbytes > INLINE_BYTES:
            loose.append(value)
    if loose:
        (folder / WEIGHTS).mkdir(parents=True, exist_ok=True)
        tensors = [v.const_value for v in loose if v.const_value is not None]
        side = _free(f"{Path(filename).stem}.data", links.values())
        for value, tensor in zip(
            loose, ir.external_data.convert_tensors_to_external(tensors, folder, side), strict=True
        ):
            value.const_value = tensor
    ir.save(copy, folder / filename)


def link(source: Path, folder: Path, links: dict[Path, str]) -> str:
    """Make `source` reachable below `folder`; returns its location relative to the folder."""
    if not source.exists():
        raise PackageError(f"the weight file {source} is gone: restore it, or lower the model again")
    if source not in links:
        taken = set(links.values())
        taken |= {f"{WEIGHTS}/{path.name}" for path in (folder / WEIGHTS).glob("*") if not path.samefile(source)}
        location = _free(source.name, taken)
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            try:
                os.link(source, target)
            except OSError as error:
                if error.errno not in _UNLINKABLE:
                    raise
                _copy(source, target)
        links[source] = location
    return links[source]


def _free(name: str, taken: Collection[str]) -> str:
    """The location of a file of that name below a folder, or the first like it that is not taken."""
    places = (f"{WEIGHTS}/{prefix}{name}" for prefix in itertools.chain([""], (f"{n}-" for n in itertools.count(1))))
    return next(place for place in places if place not in taken)


def _copy(source: Path, target: Path) -> None:
    """Copy a file and read the copy back; memory holds one chunk.

    Raises:
        PackageError: The copy differs.
    """
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as old, target.open("wb") as new:
        while chunk := old.read(_CHUNK):
            digest.update(chunk)
            size += new.write(chunk)
    if target.stat().st_size != size or digest_file(target) != digest.hexdigest():
        raise PackageError(f"the copy of {source} to {target} is not equal to it: check the disk, and compile again")
