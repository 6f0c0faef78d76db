"""Any ONNX file as a module: without states, its dims taken from its interface."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qeff_ir.errors import ModelLoadError, QeffError
from qeff_ir.module import METADATA_KEY, WEIGHT_KEY, Dim, Module
from qeff_ir.snapshot import MODEL_FILE
from qeff_ir.storage import load_model

_CONSTANT = 64
"""Initializers of up to this many elements are constants that passes may read; larger ones are weights."""


def onnx_file(text: str) -> Path | None:
    """The ONNX file that a user means: the file itself, or the snapshot in a folder; `None` for anything else."""
    path = Path(text).expanduser()
    if path.is_dir() and (path / MODEL_FILE).is_file() and not (path / "config.json").exists():
        return path / MODEL_FILE
    return path if path.suffix == ".onnx" else None


def load_onnx(path: Path) -> Module:
    """Read an ONNX file, as the module that it is or as one without states.

    Raises:
        ModelLoadError: It cannot be read.
        QeffError: It is a module of another version, or its weights are missing.
    """
    if not path.is_file():
        raise ModelLoadError(f"there is no file {path}")
    try:
        model = load_model(path)
    except QeffError:
        raise
    except Exception as error:  # protobuf has an exception class for each of its implementations
        raise ModelLoadError(f"{path} is no ONNX file ({type(error).__name__})") from error
    return Module.with_facts(model) if METADATA_KEY in model.metadata_props else plain_module(model, path.stem)


def plain_module(model: ir.Model, name: str) -> Module:
    """A module around a model without facts; dims without a name get one."""
    module = Module(model, name)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        dims: list[int | ir.SymbolicDim] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim):
                dim = dim if dim.value is not None else ir.SymbolicDim(f"{value.name}_dim_{axis}")
                module.dims[str(dim.value)] = Dim(str(dim.value))
            dims.append(dim)
        value.shape = ir.Shape(dims)
    for key, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.size > _CONSTANT:
            value.metadata_props[WEIGHT_KEY] = key
    return module
