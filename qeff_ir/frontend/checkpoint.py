"""A safetensors checkpoint as a table of references: where each tensor lies, never its bytes.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from safetensors import SafetensorError, safe_open

from qeff_ir.errors import ModelLoadError
from qeff_ir.storage import FileRange

DTYPES = {
    "BOOL": ir.DataType.BOOL,
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
}
"""Element types as safetensors spells them."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by checkpoint key."""

    folder: Path
    entries: dict[str, FileRange]

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({e.file for e in self.entries.values()})


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a folder's safetensors files.

    Raises:
        ModelLoadError: There are none, a file is missing, truncated or corrupt, or the index names a file outside.
    """
    entries: dict[str, FileRange] = {}
    for path in _files(folder):
        entries.update(read_header(path))
    return Checkpoint(folder, entries)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"{index} is not a checkpoint index ({error}): download the model again") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelLoadError(f"{index} names '{name}', a file outside the model folder: refused")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".h5", ".msgpack"})
    found = f"only {', '.join(others)}" if others else "no weights"
    raise ModelLoadError(
        f"{folder} has no model.safetensors ({found}): save the model with save_pretrained, which writes safetensors"
    )


def read_header(path: Path) -> dict[str, FileRange]:
    """The tensors of one safetensors file.

    Raises:
        ModelLoadError: The file is missing, truncated or corrupt, or has a type that is not supported.
    """
    if not path.exists():
        raise ModelLoadError(f"the checkpoint file {path} is missing: download the model again")
    real = path.resolve()
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
        entries[key] = FileRange(real, 8 + size + start, end - start, DTYPES[info["dtype"]], tuple(info["shape"]))
    return entries
