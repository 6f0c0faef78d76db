"""The inputs and outputs of a package, as its ONNX file has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qeff_ir.errors import PackageError, VerificationError
from qeff_ir.ir.module import EMBEDS, METADATA_KEY, WEIGHT_KEY, DimValue, Padding, read_facts
from qeff_ir.runtime.sizes import evaluate

BATCH, LENGTH = "batch_size", "seq_len"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output.

    Attributes:
        name: Its name.
        dtype: Its type.
        shape: Symbols and sizes; `None` for a size that the model computes.
        weight: Of an input whose rows the host looks up: the parameter that has them.
        rows: Of an input that selects rows of a table in the graph: how many there are.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[DimValue | None, ...]
    weight: str | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes into a forward pass, what comes out, and what padding does to it."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    padding: Padding = field(default_factory=Padding)


def sized(tensor: Tensor, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The static shape that a specialization gives an input.

    Raises:
        PackageError: It gives none to one of the axes.
    """
    sizes = [symbols.get(d) if isinstance(d, str) else d for d in tensor.shape]
    if None in sizes:
        raise PackageError(f"the input {tensor.name} {list(tensor.shape)} has no compiled size: compile again")
    return tuple(size for size in sizes if size is not None)


def read_interface(folder: Path) -> Interface:
    """The interface of the one ONNX file of a package; no weight is read.

    Raises:
        PackageError: There is not one, or it cannot be read.
    """
    models = list(folder.glob("*.onnx"))
    if len(models) != 1:
        raise PackageError(f"{folder} has {len(models)} ONNX files, not one: compile again")
    try:
        model = onnx.load(str(models[0]), load_external_data=False)
        graph = model.graph
    except Exception as error:  # protobuf raises types of its own
        raise PackageError(f"{models[0]} cannot be read ({type(error).__name__}): compile again") from error
    # A weight may be an input that the target binds by itself; the host's token embeddings only name theirs.
    given = [t for t in _tensors(graph.input, _rows(graph)) if t.weight is None or t.name == EMBEDS]
    return Interface(tuple(given), _tensors(graph.output, {}), _padding(model, models[0]))


def _padding(model: onnx.ModelProto, file: Path) -> Padding:
    """What the module says of padding; that it changes every output, where it says nothing.

    Raises:
        PackageError: The module's facts are damaged, or say what cannot be of its outputs.
    """
    text = next((p.value for p in model.metadata_props if p.key == METADATA_KEY), None)
    try:
        found = None if text is None else read_facts(text).padding
    except VerificationError as error:
        raise PackageError(f"{file} is damaged ({error}): compile again") from error
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in model.graph.output}
    for output in () if found is None else found.outputs:
        try:
            known = [evaluate(str(size), {BATCH: 1, LENGTH: 1}) for size in output.sizes]
        except ValueError as error:
            raise PackageError(f"{file} says of its output {output.name} that {error}: compile again") from error
        if len(known) != ranks.get(output.name):
            raise PackageError(f"{file} says other sizes of {output.name} than that has: compile again")
    return Padding() if found is None else found


def _rows(graph: onnx.GraphProto) -> dict[str, int]:
    """Rows of the smallest table that each input selects from, where one does so directly."""
    tables = {t.name: t.dims[0] for t in graph.initializer if t.dims}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tables and not any(a.i for a in node.attribute):
            rows = tables[node.input[0]]
            found[node.input[1]] = min(rows, found.get(node.input[1], rows))
    return found


def _tensors(values: Sequence[onnx.ValueInfoProto], rows: Mapping[str, int]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            v.name,
            onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type),
            tuple(_dim(d) for d in v.type.tensor_type.shape.dim),
            next((p.value for p in v.metadata_props if p.key == WEIGHT_KEY), None),
            rows.get(v.name),
        )
        for v in values
    )


def _dim(dim: Any) -> DimValue | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) or None
