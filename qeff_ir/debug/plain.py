"""Any ONNX file as a module: without states, its dims taken from its interface."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnx_ir as ir

from qeff_ir.errors import ModelLoadError, QeffError
from qeff_ir.ir.module import METADATA_KEY, WEIGHT_KEY, Dim, Module
from qeff_ir.ir.snapshot import MODEL_FILE
from qeff_ir.ir.verifier import check_order
from qeff_ir.passing.hiding import hidden_weights
from qeff_ir.reading import MAX_NAME_LENGTH
from qeff_ir.storage import load_model

_CONSTANT = 64
"""Initializers of up to this many elements are constants that passes may read; larger ones are weights."""

_OPTIONAL_INPUTS = 4
"""Version of the format from which on an initializer that is an input too is a default value."""

_ODD = re.compile(r"[^A-Za-z0-9_.+-]")
"""What the name of a file may have, and that of a module may not."""


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
    module = Module.with_facts(model) if METADATA_KEY in model.metadata_props else plain_module(model, path.stem)
    check_order(module)
    return module


def plain_module(model: ir.Model, name: str) -> Module:
    """A module around a model without facts; dims without a name get one.

    What files leave out is added: the types of outputs that shape inference tells. Weights that are listed as inputs,
    as they all had to be before version 4 of the format, are weights.

    Raises:
        ModelLoadError: An input has no type or shape, or a default value that callers may replace; or the graph has a
            cycle.
    """
    try:
        model.graph.sort()
    except ValueError as error:
        raise ModelLoadError(f"the graph of {name} has a cycle: no node of it can run first") from error
    module = Module(model, _ODD.sub("_", name)[:MAX_NAME_LENGTH].lstrip(".-") or "model")
    _unlist_weights(model, name)
    if any(value.dtype is None or value.shape is None for value in model.graph.outputs):
        _infer_outputs(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.is_graph_input() and (value.dtype is None or value.shape is None):
            raise ModelLoadError(f"the input '{value.name}' of {name} has no type or no shape: export it with both")
        dims: list[int | ir.SymbolicDim] = []
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim):
                dim = dim if dim.value is not None else ir.SymbolicDim(f"{value.name}_dim_{axis}")
                module.dims[str(dim.value)] = Dim(str(dim.value))
            dims.append(dim)
        if value.shape is not None:
            value.shape = ir.Shape(dims)
    for key, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.size > _CONSTANT:
            value.metadata_props[WEIGHT_KEY] = key
    return module


def _unlist_weights(model: ir.Model, name: str) -> None:
    """Take initializers off the list of inputs, where the format wanted them there."""
    graph = model.graph
    listed = [index for index, value in enumerate(graph.inputs) if value.is_initializer()]
    if listed and model.ir_version >= _OPTIONAL_INPUTS:
        raise ModelLoadError(
            f"the input '{graph.inputs[listed[0]].name}' of {name} has a default value, an initializer of its name, "
            "which passes would take for a constant: take it off the inputs, or off the initializers"
        )
    for index in reversed(listed):
        del graph.inputs[index]
    model.ir_version = max(model.ir_version, _OPTIONAL_INPUTS)


def _infer_outputs(model: ir.Model) -> None:
    """Give outputs the types and shapes that follow from the graph, where they declare none."""
    named = {d for v in model.graph.inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim)}
    with hidden_weights(model.graph):
        proto = ir.to_proto(model)
    try:
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    except Exception as error:  # each way of being no sound graph has a type of its own
        said = " ".join(str(error).split())[:200]
        raise ModelLoadError(f"the types of the outputs cannot be told ({said}): export the model again") from error
    for value, found in zip(model.graph.outputs, inferred.graph.outputs, strict=True):
        if value.type is None:
            value.type = found.type
        if value.shape is None and found.shape is not None and value.type == found.type:
            kept = [d if isinstance(d, int) or d in named else ir.SymbolicDim(None) for d in found.shape]
            value.shape = ir.Shape(kept)
