"""Join positions and places on further axes in one input, as the contract has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import ALL_PLANES, AXES, PLANES, POSITIONS, name_of
from qeff_ir.numerics import Exact, Numeric
from qeff_ir.passing.base import Pass, Phase, Rewriter, register


@register
@dataclass(frozen=True, slots=True)
class JoinPlanes(Pass):
    """Let ``position_ids`` be ``[4, batch_size, seq_len]``: the positions, then places on three axes (contract §1.1).

    Everything else in the graph keeps its own part, so all passes that ask for positions come before. A model without
    places on further axes stays as it is.
    """

    name: ClassVar[str] = "join-planes"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    changes_interface: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Exact()

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Put one input in the place of two."""
        planes = module.find(PLANES)
        if planes is None or planes.shape is None or not rewriter.rewrite("planes"):
            return
        positions, graph = module.port(POSITIONS), module.graph
        b = rewriter.at(next(iter(graph)))
        name, shape = name_of(POSITIONS), planes.shape.dims[1:]
        positions.name = None
        del module.ports[name]
        whole = ir.val(name, shape=ir.Shape([1 + AXES, *shape]), dtype=ir.DataType.INT64)
        module.declare(whole, ALL_PLANES)
        graph.inputs[list(graph.inputs).index(positions)] = whole
        graph.inputs.remove(planes)
        first = b("Gather", whole, b.const(0), axis=0, shape=ir.Shape(shape), dtype=ir.DataType.INT64)
        rest = b("Slice", whole, b.const([1]), b.const([1 + AXES]), b.const([0]), shape=planes.shape)
        positions.replace_all_uses_with(first)
        planes.replace_all_uses_with(rest)
        rest.dtype = ir.DataType.INT64
