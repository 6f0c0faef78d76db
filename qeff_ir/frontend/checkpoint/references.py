"""A safetensors checkpoint as a table of references: where each tensor lies, never its bytes.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from safetensors import SafetensorError, safe_open

from qeff_ir.errors import ModelLoadError
from qeff_ir.ranges import FileRange
from qeff_ir.reading import read_json, regular_file

if TYPE_CHECKING:
    from qeff_ir.frontend.checkpoint.formats import Decoded, WeightFormat

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What transformers looks for in a folder, in this order."""

DTYPES = {
    "BOOL": ir.DataType.BOOL,
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "F8_E8M0": ir.DataType.FLOAT8E8M0,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U64": ir.DataType.UINT64,
    "U32": ir.DataType.UINT32,
    "U16": ir.DataType.UINT16,
    "U8": ir.DataType.UINT8,
}
"""Element types as safetensors spells them."""


_OTHER_FORMS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"}
"""Endings of weights in forms that are not read."""

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of a checkpoint that each rank of a training run wrote its own part of."""

Mark = tuple[int, int, int]
"""Inode, size and time of the last change of a file."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by checkpoint key.

    Attributes:
        folder: Where it is.
        entries: Where each tensor lies. Of a key in several files, the last file's is taken, as transformers does.
        marks: What each file was when its header was read.
        decoded: Weights that are made of several tensors, by the key of the weight.
        left_out: Tensors that no weight is made of: scales of activations, say.
        reference: ``quantization_config`` with which transformers reads what is decoded, if it does.
    """

    folder: Path
    entries: dict[str, FileRange]
    marks: dict[Path, Mark] = field(default_factory=dict[Path, Mark])
    decoded: Mapping[str, Decoded] = field(default_factory=dict[str, "Decoded"])
    left_out: frozenset[str] = frozenset()
    reference: dict[str, Any] | None = None

    @property
    def weights(self) -> dict[str, FileRange | ir.LazyTensor]:
        """What the model's weights are made of by key: what is decoded, and the tensors that are no part of it."""
        parts = self.left_out.union(*(found.parts for found in self.decoded.values()))
        plain = {key: entry for key, entry in self.entries.items() if key not in parts}
        return {**plain, **{key: found.tensor for key, found in self.decoded.items()}}

    def decode(self, format: WeightFormat) -> Checkpoint:
        """The checkpoint whose quantized weights are read; a warning tells which tensors are left out.

        Raises:
            ModelLoadError: See `WeightFormat.weights`.
        """
        decoded = {found.key: found for found in format.weights(self.entries)}
        parts = {part for found in decoded.values() for part in found.parts}
        left_out = [key for key in self.entries if key not in parts and format.left_out(key)]
        if left_out:
            warnings.warn(
                f"{self.folder} has {len(left_out)} scales of activations or of the cache, the first is "
                f"'{left_out[0]}': they are left out, and only the weights are quantized",
                stacklevel=2,
            )
        reference = format.reference(decoded, self.entries)
        return replace(self, decoded=decoded, left_out=frozenset(left_out), reference=reference)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({e.file for e in self.entries.values()})

    def check_unchanged(self) -> None:
        """Tell when a file is no longer the one whose header was read: tensors would be elsewhere in it.

        Raises:
            ModelLoadError: It is.
        """
        for file, before in self.marks.items():
            if mark(file) != before:
                raise ModelLoadError(f"the checkpoint file {file} was changed or removed: open the model again")


def open_checkpoint(folder: Path, named: object = None, extra: Iterable[str] = ()) -> Checkpoint:
    """Read the headers of the safetensors files that transformers would read.

    ``model.safetensors`` comes first, then the shards of ``model.safetensors.index.json``, which may be in folders
    inside of `folder`. All tensors of a shard count, whatever the index says of them.

    Args:
        folder: The model.
        named: The file or index that config.json names instead (``transformers_weights``), if any.
        extra: Names of files that are read too where they are there (``extra_files`` of a configuration's class).

    Raises:
        ModelLoadError: There are none, a file is missing, truncated or corrupt, or the index names a file outside.
    """
    files = _files(folder, named)
    files += [folder / name for name in extra if (folder / name).is_file() and folder / name not in files]
    entries: dict[str, FileRange] = {}
    marks: dict[Path, Mark] = {}
    for path in files:
        real = _whole(path, folder)
        marks[real] = mark(real) or (0, 0, 0)
        entries.update(read_header(path, folder))
    return Checkpoint(folder, entries, marks)


def mark(file: Path) -> Mark | None:
    """What a file is now; `None` where there is none."""
    try:
        info = file.stat()
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns


def _files(folder: Path, named: object) -> list[Path]:
    names = sorted(path.name for path in folder.iterdir())
    distributed = next((name for name in names if _DISTRIBUTED.match(name)), None)
    if distributed is not None:
        raise ModelLoadError(
            f"{folder} is a checkpoint of a distributed training run ({distributed}), which is not read: load the "
            "model with transformers, and save it with save_pretrained"
        )
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelLoadError(
                f"{folder / 'config.json'} names the weights {named!r:.100} (transformers_weights), which is neither a "
                "safetensors file nor an index of some: save the model with save_pretrained"
            )
        return _shards(folder, folder / named) if named.endswith(".json") else [folder / named]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder, folder / INDEX)
    for name in (SINGLE, INDEX):
        if name in names:
            regular_file(folder / name)  # says what it is instead
    others = [name for name in names if Path(name).suffix in _OTHER_FORMS]
    found = f"only {', '.join(others[:5])}" if others else "no weights"
    if files := [name for name in others if name.endswith(".gguf")]:
        raise ModelLoadError(
            f"{folder} has no {SINGLE} ({found}): pass gguf_file={files[0]!r}, or the path of that file"
        )
    raise ModelLoadError(
        f"{folder} has no {SINGLE} ({found}): save the model with save_pretrained, which writes safetensors"
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    data = read_json(index, folder)
    names = data.get("weight_map") if isinstance(data, dict) else None  # pyright: ignore[reportUnknownMemberType]
    if not isinstance(names, dict) or not names or not isinstance(data.get("metadata"), dict):  # pyright: ignore[reportUnknownMemberType]
        raise ModelLoadError(
            f"{index} is not a checkpoint index (it has no weight_map, or no metadata): download the model again"
        )
    shards = list(names.values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType, reportUnknownVariableType]
    for name in shards:  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{index} names {name!r:.100}, which is not a safetensors file: refused")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelLoadError(f"{index} names '{name}', a file outside the model folder: refused")
    return [folder / name for name in sorted(set(shards))]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _whole(path: Path, root: Path | None) -> Path:
    """The real path of a weight file; a missing one is told as such."""
    try:
        missing = not path.exists() and not path.is_symlink()
        place = path.resolve().parent if root is None else root
    except (OSError, ValueError, RuntimeError):  # a name that no file can have: `regular_file` tells
        missing, place = False, path.parent
    if missing:
        raise ModelLoadError(f"the checkpoint file {path} is missing: download the model again")
    return regular_file(path, place)


def read_header(path: Path, root: Path | None = None) -> dict[str, FileRange]:
    """The tensors of one safetensors file.

    Args:
        path: The file.
        root: Folder that it must stay in, links followed; any place is fine when not given.

    Raises:
        ModelLoadError: The file is missing, truncated or corrupt, is not a regular file inside of the root, or has a
            type that is not supported.
    """
    real = _whole(path, root)
    try:
        with safe_open(real, framework="numpy"):  # the library's own validation of header and file size
            pass
        with real.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ModelLoadError(
            f"{path} is not a whole safetensors file ({error}): download or save the model again"
        ) from error
    entries: dict[str, FileRange] = {}
    for key, info in header.items():
        if key == "__metadata__":
            continue
        if info["dtype"] not in DTYPES:
            raise ModelLoadError(f"tensor '{key}' in {path} has type {info['dtype']}, which is not supported")
        start, end = info["data_offsets"]
        entries[key] = FileRange(
            real, 8 + size + start, end - start, DTYPES[info["dtype"]], tuple(info["shape"]), linkable=True
        )
    return entries
