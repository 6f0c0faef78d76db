"""The interface of a compiled model: the ports that a caller sees, and what the session keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from qeff_ir.errors import PackageError
from qeff_ir.ir.baked import names_of
from qeff_ir.ir.module import WEIGHT_KEY, Module, Padding
from qeff_ir.ir.ports import EMBEDDINGS, Port, Role
from qeff_ir.ir.residents import DimValue, Resident
from qeff_ir.runtime.sizes import evaluate

BATCH, LENGTH = "batch_size", "seq_len"


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes into a run, what comes out, and what stays.

    Attributes:
        inputs: What a caller gives at each run, in the order of the graph.
        outputs: What a run returns.
        residents: What a session keeps between runs: what a run leaves for the next one, and what the host wrote.
        padding: What padding does to the outputs of a model without a cache.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    residents: tuple[Resident, ...] = ()
    padding: Padding = field(default_factory=Padding)

    def input(self, role: Role) -> Port | None:
        """The input of a role; `None` when there is none."""
        return next((port for port in self.inputs if port.role is role), None)

    def output(self, role: Role) -> Port | None:
        """The output of a role; `None` when there is none."""
        return next((port for port in self.outputs if port.role is role), None)


def sized(port: Port, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The static shape that a specialization gives a port.

    Raises:
        PackageError: It gives none to one of the axes.
    """
    sizes = [symbols.get(d) if isinstance(d, str) else d for d in port.shape]
    if None in sizes:
        raise PackageError(f"{port.name} {list(port.shape)} has no compiled size: compile again")
    return tuple(size for size in sizes if size is not None)


def interface_of(module: Module, file: Path) -> Interface:
    """The interface of a module that was read from a file of a package; no weight is read.

    Raises:
        PackageError: An input or output has no type or shape, or the facts give an output sizes that it cannot have.
    """
    kept = {name for resident in module.residents for name in resident.names}
    # Of a file without facts, names tell what the device pairs (AI 100 contract §1.1).
    names = {str(v.name) for v in module.graph.outputs}
    paired = {str(v.name) for v in module.graph.inputs if f"{v.name}{Resident.SUFFIX}" in names}
    kept |= paired | {name + Resident.SUFFIX for name in paired}
    rows = _rows(module.graph)
    # A weight may be an input that the target binds by itself; the host's token embeddings only name theirs.
    given = [v for v in module.graph.inputs if WEIGHT_KEY not in v.metadata_props or module.role_of(v) is EMBEDDINGS]
    inputs = [_port(module, v, rows, file) for v in given if v.name not in kept]
    outputs = [_port(module, v, {}, file) for v in module.graph.outputs if v.name not in kept]
    padding = module.padding if module.padding is not None else Padding()
    _check_padding(padding, outputs, file)
    return Interface(tuple(inputs), tuple(outputs), tuple(module.residents), padding)


def _check_padding(padding: Padding, outputs: Sequence[Port], file: Path) -> None:
    ranks = {port.name: len(port.shape) for port in outputs}
    for output in padding.outputs:
        try:
            known = [evaluate(str(size), {BATCH: 1, LENGTH: 1}) for size in output.sizes]
        except ValueError as error:
            raise PackageError(f"{file} says of its output {output.name} that {error}: compile again") from error
        if len(known) != ranks.get(output.name):
            raise PackageError(f"{file} says other sizes of {output.name} than that has: compile again")


def _rows(graph: ir.Graph) -> dict[str, int]:
    """Rows of the smallest table that each input selects from, where one does so directly."""
    found: dict[str, int] = {}
    for node in graph:
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
            continue
        table, index = (*node.inputs, None, None)[:2]
        tensor = table.const_value if table is not None else None
        if tensor is None or index is None or not len(tensor.shape):
            continue
        rows = int(tensor.shape.numpy()[0])
        found[str(index.name)] = min(rows, found.get(str(index.name), rows))
    return found


def _port(module: Module, value: ir.Value, rows: Mapping[str, int], file: Path) -> Port:
    if value.dtype is None or value.shape is None:
        raise PackageError(f"{file} does not say the type and the shape of {value.name}: compile again")
    dims: list[DimValue | None] = [d if isinstance(d, int) else d.value for d in value.shape]
    weight, name = value.metadata_props.get(WEIGHT_KEY), str(value.name)
    baked = len(names_of(value))
    table = baked + 1 if baked else rows.get(name)  # the base model is the first
    return Port(name, module.role_of(value), value.dtype.numpy(), tuple(dims), weight, table)
