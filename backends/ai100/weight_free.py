"""The weight-free form (contract §15.1): weights are graph inputs, which the compiler binds from safetensors by itself.

The checkpoint's own files are put into the package. What is in none of them as it stands in the graph (another
layout, another element type, numbers that a pass has changed) is written once, one tensor at a time, to a file beside
them. Constants that are no weights stay in the graph.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qeff_ir import quantized, widening
from qeff_ir.errors import ModelLoadError, PackageError
from qeff_ir.frontend.checkpoint.references import DTYPES, read_header
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.ranges import FileRange, file_range
from qeff_ir.storage import WEIGHTS, place

METADATA = "com.qti.aisw.extdata"
"""Model metadata in which the compiler looks for the places of the weights."""
SPEC = "weight_spec.json"
"""The same beside the ONNX file."""
PREPARED = f"{WEIGHTS}/prepared.safetensors"
"""File of the tensors that no checkpoint file has."""

_VERSION = 5


def save(model: ir.Model, folder: Path, filename: str, name: str) -> None:
    """Write ``folder/filename`` without weights, and the files that the compiler takes them from.

    Args:
        model: The model; unchanged.
        folder: Where to write.
        filename: Of the ONNX file.
        name: Of the model, for the reader of the specification.

    Raises:
        PackageError: A weight file is gone.
    """
    copy = model.clone()
    widening.spell(copy)
    quantized.spell(copy)
    headers: dict[Path, dict[tuple[Any, ...], str]] = {}
    bound: dict[str, tuple[FileRange | None, str]] = {}
    loose: dict[str, ir.TensorProtocol] = {}
    first: dict[int, str] = {}  # a tied tensor is written once
    for value in list(copy.graph.initializers.values()):
        tensor, own = value.const_value, value.name or ""
        where = file_range(tensor)
        if tensor is None or (where is None and WEIGHT_KEY not in value.metadata_props):
            continue
        key = None if where is None else _key(where, headers)
        if where is not None and key is not None:
            bound[own] = where, key
        else:
            key = first.setdefault(id(tensor), own)
            loose.setdefault(key, tensor)
            bound[own] = None, key
        del copy.graph.initializers[own]
        value.const_value = None
        copy.graph.inputs.append(value)
    # No file of the checkpoint may take the name of the one that is written.
    files = place((where for where, _ in bound.values() if where is not None), folder, reserved=[PREPARED])
    if loose:
        _write(folder / PREPARED, loose)
    locations = {own: (PREPARED if where is None else files[where.file], key) for own, (where, key) in bound.items()}
    text = _specification(name, locations)
    copy.metadata_props[METADATA] = text
    ir.save(copy, folder / filename)
    (folder / SPEC).write_text(text)


def specification(proto: onnx.ModelProto) -> Mapping[str, Any] | None:
    """What the metadata of a model say about its weights; `None` for a model of the usual form.

    Raises:
        PackageError: They say nothing that can be read.
    """
    text = next((p.value for p in proto.metadata_props if p.key == METADATA), None)
    if text is None:
        return None
    try:
        found: Any = json.loads(text)
        [(i["name"], found["files"][i["location"]["file"]]["path"], i["location"]["key"]) for i in found["inputs"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PackageError(f"the metadata {METADATA} are no list of weights ({error}): compile again") from error
    return found


def places(spec: Mapping[str, Any], folder: Path) -> dict[str, FileRange]:
    """Where the weight of each input lies.

    Raises:
        PackageError: A file is outside of the folder or cannot be read, or lacks a tensor.
    """
    headers: list[dict[str, FileRange]] = []
    for file in spec["files"]:
        path = folder / file["path"]
        # Not resolved: a file may be a link, but what is named has to be inside.
        if ".." in Path(file["path"]).parts or not path.absolute().is_relative_to(folder.absolute()):
            raise PackageError(f"the weights lie in '{file['path']}', outside the folder: refused")
        try:
            headers.append(read_header(path))
        except ModelLoadError as error:
            raise PackageError(f"{error}; compile again") from error
    found: dict[str, FileRange] = {}
    for item in spec["inputs"]:
        key = item["location"]["key"]
        header = headers[item["location"]["file"]]
        if key not in header:
            raise PackageError(f"no weight file has the tensor '{key}' of the input {item['name']}: compile again")
        found[item["name"]] = header[key]
    return found


def bind(proto: onnx.ModelProto, folder: Path) -> None:
    """Give a weight-free model its weights as initializers, by reference, in place; as the compiler does.

    Raises:
        PackageError: See `places`; or a weight is of another type or shape than its input.
    """
    spec = specification(proto)
    if spec is None:
        return
    inputs = {value.name: value for value in proto.graph.input}
    files = {(folder / f["path"]).resolve(): f["path"] for f in spec["files"]}
    for name, where in places(spec, folder).items():
        value = inputs.get(name)
        if value is None:
            raise PackageError(f"the graph has no input '{name}' to bind a weight to: compile again")
        shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        if (value.type.tensor_type.elem_type, shape) != (where.dtype.value, where.shape):
            raise PackageError(f"the weight of the input {name} is {where.dtype.name} {list(where.shape)}, not so")
        made = proto.graph.initializer.add(
            name=name, data_type=where.dtype.value, dims=where.shape, data_location=onnx.TensorProto.EXTERNAL
        )
        entries = {"location": files[where.file], "offset": where.offset, "length": where.length}
        for key, entry in entries.items():
            made.external_data.add(key=key, value=str(entry))
        proto.graph.input.remove(value)


def _key(where: FileRange, headers: dict[Path, dict[tuple[Any, ...], str]]) -> str | None:
    """The tensor's name in its file; `None` when the file is no safetensors file, or the graph has another view."""
    if where.file not in headers:
        try:
            entries = read_header(where.file) if where.file.suffix == ".safetensors" else {}
        except ModelLoadError as error:
            raise PackageError(str(error)) from error
        headers[where.file] = {(e.offset, e.length, e.dtype, e.shape): k for k, e in entries.items() if e.length}
    return headers[where.file].get((where.offset, where.length, where.dtype, where.shape))


def _specification(name: str, places: Mapping[str, tuple[str, str]]) -> str:
    files = list(dict.fromkeys(file for file, _ in places.values()))
    data = {
        "model_name": name,
        "model_id": WEIGHTS,
        "version": _VERSION,
        "files": [{"path": file, "format": "safetensors"} for file in files],
        "inputs": [
            {"name": own, "location": {"file": files.index(file), "key": key}} for own, (file, key) in places.items()
        ],
    }
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _write(path: Path, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """A safetensors file, written one tensor after the other."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        shape: Sequence[int] = [int(d) for d in tensor.shape.numpy()]
        header[key] = {"dtype": codes[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            np.ascontiguousarray(tensor.numpy()).tofile(file)
