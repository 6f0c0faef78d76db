"""A pass that adds an input: rows of a run continue any rows of the caches (continuous batching, contract §1.1).

The caches get a dim of rows of their own, ``full_batch_size``. The input ``batch_index`` is declared with its role, by
which every session and runner knows what to give it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import CACHE_ROW, name_of
from qeff_ir.ir.residents import Resident
from qeff_ir.passing import AllSites, Expect, Pass, Rewriter

ROWS = "full_batch_size"


@dataclass(frozen=True, slots=True)
class CacheRows(Pass):
    """Read and write the rows of the states that ``batch_index`` names, int64 ``[batch_size, 1]``."""

    name: ClassVar[str] = "cache-rows"
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = AllSites()

    rows: int = dataclasses.field(default=4, metadata={"help": "rows of the caches"})

    def sites(self, module: Module) -> list[ir.Node]:
        """The updates of states that still have the rows of a run."""
        found = [module.output(s.output).producer() for s in module.states if s.shape[0] != ROWS]
        return [node for node in found if node is not None]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Select the rows before each update, and put them back after it."""
        if not self.sites(module):
            return
        ids = ir.val(name_of(CACHE_ROW), shape=ir.Shape(["batch_size", 1]), dtype=ir.DataType.INT64)
        module.add_input(ids, CACHE_ROW)
        wide = [self._widened(module, state, ids, rewriter) for state in module.states]
        module.residents = [*wide, *module.adapters]
        module.dims[ROWS] = Dim(ROWS)
        module.set_size(ROWS, self.rows)

    def _widened(self, module: Module, state: Resident, ids: ir.Value, rewriter: Rewriter) -> Resident:
        past, result = module.input(state.input), module.output(state.output)
        update = result.producer()
        assert update is not None
        if not rewriter.rewrite("state"):
            return state
        b = rewriter.at(next(iter(module.graph)))  # before all that looks at the states
        rows = b("Squeeze", ids, b.const([1]))
        own = b("Gather", past, rows, axis=0)
        for node in past.consumers():
            for index, value in enumerate(node.inputs):
                if value is past and node is not own.producer():
                    node.replace_input_with(index, own)
        wide = ir.Shape([ROWS, *state.shape[1:]])
        after = rewriter.after(update)
        kept = after("ScatterND", past, ids, result, shape=wide)
        module.graph.outputs[list(module.graph.outputs).index(result)] = kept
        result.name, kept.name = f"{state.input}.of_run", result.name
        past.shape = wide
        return dataclasses.replace(state, shape=(ROWS, *state.shape[1:]))
