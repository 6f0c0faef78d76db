"""Weights where the AI 100 contract wants them: files of the folder, or inputs that the compiler binds (§15.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx

from backends.ai100 import weight_free
from backends.ai100.violation import Violation


def bound_weights(proto: onnx.ModelProto, spec: Mapping[str, Any], folder: Path) -> Iterator[Violation]:
    """Every weight is found where the metadata say, as its input wants it, and the graph holds none itself (§15.1)."""
    text = next(p.value for p in proto.metadata_props if p.key == weight_free.METADATA)
    sidecar = folder / weight_free.SPEC
    if not sidecar.is_file() or sidecar.read_text() != text:
        yield Violation("weight-free", f"{weight_free.SPEC} does not say what the model's metadata say")
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer):
        yield Violation("weight-free", "a model without weights has an initializer in a file of its own")
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    weight_free.bind(whole, folder)


def weight_files(proto: onnx.ModelProto, folder: Path) -> Iterator[Violation]:
    """Every weight in a file of its own lies in the folder, as long as its type and shape say."""
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        fields = {e.key: e.value for e in tensor.external_data}
        location = PurePosixPath(fields.get("location", ""))
        if location.is_absolute() or ".." in location.parts:
            yield Violation("external-data", f"{tensor.name} lies in {location}, outside the folder: copy or link it")
            continue
        file = folder / location
        try:
            size = math.prod(tensor.dims)
            size *= np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
            length, offset = int(fields.get("length", size)), int(fields.get("offset", 0))
        except (KeyError, ValueError):
            yield Violation("external-data", f"{tensor.name} has no type, or a reference that has no numbers")
            continue
        if length != size:
            yield Violation("external-data", f"{tensor.name} takes {size} bytes, its reference says {fields['length']}")
        if not file.is_file() or file.stat().st_size < offset + size:
            yield Violation("external-data", f"{location}, which holds {tensor.name}, is missing or too short")
