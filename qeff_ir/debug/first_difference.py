"""The first value that differs between two modules, where their answers do: a place in the graph, not only a pass.

Both modules run one trace with all their values as outputs. A value stands for the other module's value of its name, or
that the same node makes or takes in its place (`qeff_ir.debug.diff.counterparts`). Values whose shape has changed are
not compared, and none at padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.debug.diff import counterparts
from qeff_ir.debug.drive import driven, make_plan
from qeff_ir.debug.equivalence import MARGIN, depth_of, error_of, nudged
from qeff_ir.ir.module import PASS_KEY, Module
from qeff_ir.ir.ports import Run
from qeff_ir.ir.sources import source_text
from qeff_ir.numerics import bound
from qeff_ir.runtime.interface import BATCH, LENGTH


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two modules part.

    Attributes:
        name: The first value that differs, of the later module.
        was: The value that it stands for.
        op: Operator that makes it.
        source: Hugging Face module of that node; empty when unknown.
        made_by: Pass that made the node; empty for the frontend's.
        run: Number of the run of the trace, from 0.
        error: ``max|error| / rms`` of the value.
        limit: The largest error that rounding explains.
    """

    name: str
    was: str
    op: str
    source: str
    made_by: str
    run: int
    error: float
    limit: float

    def __str__(self) -> str:
        where = f" of {self.source}" if self.source else ""
        by = f", made by {self.made_by}" if self.made_by else ""
        before = f" from %{self.was}" if self.was != self.name else ""
        return (
            f"%{self.name} ({self.op}{where}{by}) differs first{before}: in run {self.run} by {self.error:.1e} of its "
            f"rms, rounding explains {self.limit:.1e}"
        )


def first_difference(before: Module, after: Module, seed: int = 0) -> Difference | None:
    """Find where a module parts from the one that it was made of.

    Args:
        before: The module that is right.
        after: The module that answers otherwise.
        seed: Of the trace.

    Returns:
        Of the first run that shows a difference, the first in the order of the graph; `None` where all values that can
        be compared agree.

    Raises:
        RuntimeInputError: One of the two cannot be run.
    """
    known, own = _computed(before), _computed(after)
    pairs = {b: a for b, a in counterparts(before.graph, after.graph).items() if b in own and a in known}
    nodes = [(node, name) for node in after.graph for v in node.outputs if (name := str(v.name)) in pairs]
    plan, least = make_plan(before, seed), bound(max(depth_of(before), 1))
    traces = (
        driven(_showing(module, names), plan)
        for module, names in ((before, pairs.values()), (nudged(before, seed), pairs.values()), (after, pairs))
    )
    for number, (right, moved, wrong) in enumerate(zip(*traces, strict=True)):
        for node, name in nodes:
            was = pairs[name]
            at = _real_tokens(known[was], right.run)
            if right.result[was].shape != wrong.result[name].shape or at is None:
                continue
            expected, rounded, found = at(right.result[was]), at(moved.result[was]), at(wrong.result[name])
            error, limit = _error(found, expected), max(least, MARGIN * _error(rounded, expected))
            if error > limit:
                made_by = node.metadata_props.get(PASS_KEY, "")
                return Difference(name, was, node.op_type, source_text(node), made_by, number, error, limit)
    return None


def _computed(module: Module) -> dict[str, ir.Shape | None]:
    """Shapes of the values that depend on an input; those made of weights alone are as large as the weights."""
    inputs = {v.name: v.shape for v in module.graph.inputs}
    found = dict[str, ir.Shape | None]()
    for node in module.graph:
        if any(v is not None and (v.name in found or v.name in inputs) for v in node.inputs):
            found |= {str(v.name): v.shape for v in node.outputs if v.name}
    return found


def _showing(module: Module, names: Iterable[str]) -> Module:
    """A copy that has inner values as outputs too, of any shape: a pass may leave that of an inner value wrong."""
    copy = module.clone()
    wanted, outputs = set(names), {v.name for v in copy.graph.outputs}
    for value in [v for node in copy.graph for v in node.outputs if v.name in wanted - outputs]:
        value.shape = None
        copy.graph.outputs.append(value)
    return copy


def _real_tokens(shape: ir.Shape | None, run: Run | None) -> Callable[[Array], Array] | None:
    """Takes the real tokens out of a value; `None` where it has none and the run has padding."""
    if run is None or (run.positions >= 0).all():
        return lambda value: value
    dims = [d if isinstance(d, int) else d.value for d in shape or ()]
    if dims[:1] != [BATCH] or LENGTH not in dims:
        return None
    return lambda value: np.moveaxis(value, dims.index(LENGTH), 1)[run.positions >= 0]


def _error(values: Array, reference: Array) -> float:
    """`error_of`, of numbers that need not be finite: masks have infinities."""
    finite = np.isfinite(reference)
    if not np.array_equal(values[~finite], reference[~finite], equal_nan=True):
        return math.inf
    if reference.dtype.kind != "f":
        return 0.0 if np.array_equal(values, reference) else math.inf
    return error_of(values[finite], reference[finite])
