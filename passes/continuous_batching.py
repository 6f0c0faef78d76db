"""Let a run name the rows of the caches that it continues, so that requests come and go (continuous batching)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir import operators
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import CACHE_ROW, CACHE_ROWS, NEXT_TOKENS, name_of
from qeff_ir.numerics import Exact, Numeric
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AtLeast, Expect

from .kv_layouts import LAYOUTS, Layout

BATCH = "batch_size"


@register
@dataclass(frozen=True, slots=True)
class ContinuousBatching(Pass):
    """Give the caches ``rows`` rows, ``full_batch_size``, of which a run continues those in its ``batch_index``.

    The input is int64 ``[batch_size, 1]`` (AI 100 contract §1.1); a row of padding may have -1 there, and continues
    none. The layout of the caches says how a run gets at its rows (`passes.kv_layouts.Layout.index_rows`): the graph
    indexes them on the AI 100, and on ONNX Runtime the session hands it a part of the same buffers.

    ``rows=0`` is as many as the largest run has. Nothing of an earlier request has to be cleared: a cache shows only
    slots that the request has written, and a recurrence starts anew at position 0.
    """

    name: ClassVar[str] = "continuous-batching"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    changes_interface: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Exact()
    expect: ClassVar[Expect] = AtLeast(0)

    rows: int = field(default=0, metadata={"help": "rows of the caches", "least": 0})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Add the input, and let the layout use it.

        Raises:
            PassError: A state is the host's or an encoder's to write, a run has more rows than the caches, the layout
                does not say how a run gets at its rows, or the graph draws its tokens already.
        """
        if not module.states or module.find(CACHE_ROW) is not None:
            return
        if module.find(NEXT_TOKENS) is not None:
            raise PassError("the graph draws its tokens already: put continuous-batching before sampling")
        theirs = next((s.input for s in module.states if s.written_by_host), None)
        if theirs is not None:
            raise PassError(f"{theirs} is not written by the runs of a decoder: leave out continuous-batching")
        if not module.specializations:
            raise PassError("continuous-batching sizes the caches: set the module's specializations before it")
        largest = max(s.symbols[BATCH] for s in module.specializations)
        rows = self.rows or largest
        if rows < largest:
            raise PassError(
                f"a run of {largest} rows needs as many of the caches, which have {rows}: give rows={largest}"
            )
        layout = _layout(module)
        if not rewriter.rewrite("rows"):
            return
        index = ir.val(name_of(CACHE_ROW), shape=ir.Shape([BATCH, 1]), dtype=ir.DataType.INT64)
        module.add_input(index, CACHE_ROW)
        module.dims[CACHE_ROWS] = Dim(CACHE_ROWS)
        module.set_size(CACHE_ROWS, rows)
        layout.index_rows(module, rewriter, index)
        operators.attach(module.model)


def _layout(module: Module) -> type[Layout]:
    """The layout that the caches have."""
    found = next((cls for name, cls in LAYOUTS.items() if f"{name}-layout" in module.properties), None)
    if found is None:
        raise PassError("the caches have no layout that says how a run gets at its rows: put kv-retention before it")
    return found
