"""Shrink the module of a bundle while it still fails in the same way: delta debugging over outputs, then over nodes.

Outputs are dropped in halves (`ddmin`), a state's output with the state. Then the graph is cut from both ends: an inner
value becomes the only output, by halves and then from node to node, and inner values become inputs, so that all nodes
behind and before them fall away. Each trial runs the failing pass; one that fails in another way, or not at all, is
undone. The largest part of the result that passes is kept beside it: the two differ by what makes it fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from qeff_ir.debug.bundle import Bundle, write_bundle
from qeff_ir.debug.drive import drive, make_plan
from qeff_ir.debug.replay import attempt, failing_pass, recorded
from qeff_ir.errors import BundleError, QeffError
from qeff_ir.ir import operators
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.snapshot import save_module
from qeff_ir.passing import properties

PASSING = "passing"
"""Folder of the nearest module that passes, inside the reduced bundle."""
_TRIALS = 400

Say = Callable[[str], None]


@dataclass
class Reduction:
    """What came of it.

    Attributes:
        failing: The smallest module found that fails in the same way.
        passing: The largest part of it that was tried and runs without an error; `None` when there is none.
        nodes: Nodes before and after.
        trials: Modules that were tried.
    """

    failing: Module
    passing: Module | None
    nodes: tuple[int, int]
    trials: int


def reduce(bundle: Bundle, *, say: Say = lambda _: None, trials: int = _TRIALS) -> Reduction:
    """Shrink the module before the failing pass.

    Args:
        bundle: From a failed run.
        say: Told of each success.
        trials: Most modules to try.

    Raises:
        BundleError: The bundle does not fail here.
        PipelineError: A pass is not known here.
    """
    search = _Search(bundle, say, trials)
    search.drop_outputs()
    search.cut_behind()
    while search.cut_before() or search.step_back():
        pass  # a later cut can make an earlier one possible; the last round also tries all neighbors of the result
    return Reduction(search.best, search.passing, (len(bundle.module.graph), len(search.best.graph)), search.count)


def write_reduction(bundle: Bundle, found: Reduction, folder: Path) -> Path:
    """Write the reduced bundle, with the nearest passing module in it.

    Raises:
        BundleError: The folder holds something else, or cannot be written.
    """
    (inner, _), *_ = failing_pass(bundle)
    data = dataclasses.replace(bundle.metadata, pass_id=inner, pipeline=str(failing_pass(bundle)))
    data = dataclasses.replace(data, suffix=data.pipeline)
    try:
        trace = drive(found.failing, make_plan(found.failing, data.seed))
    except QeffError:
        trace = None
    written = write_bundle(folder, data, found.failing, found.failing, trace)
    if found.passing is not None:
        save_module(found.passing.clone(), written / PASSING)
    return written


class _Search:
    """The state of a reduction: the best module so far, and the nearest that passed."""

    def __init__(self, bundle: Bundle, say: Say, trials: int) -> None:
        self.best, self.count = bundle.module, 0
        self._pipeline, self._data, self._was = failing_pass(bundle), bundle.metadata, recorded(bundle)
        self._say, self._trials = say, trials
        self.passing: Module | None = None
        if not self._was.like(attempt(self.best, self._pipeline, self._data.check, seed=self._data.seed)):
            raise BundleError(
                f"{self._was.pass_id} does not fail here as the bundle says: run 'qeff replay' to see what it does"
            )

    def drop_outputs(self) -> None:
        """`ddmin` over the graph outputs."""
        names, parts = [v.name or "" for v in self.best.graph.outputs], 2
        while len(names) > 1:
            size = -(-len(names) // parts)
            chunks = [names[i : i + size] for i in range(0, len(names), size)]
            kept = [*chunks, *([n for n in names if n not in c] for c in chunks)] if parts > 2 else chunks
            smaller = next((k for k in kept if self._try(_with_outputs(self.best, k), f"outputs {', '.join(k)}")), None)
            if smaller is not None:
                names, parts = smaller, 2
            elif size == 1:
                return
            else:
                parts = min(parts * 2, len(names))

    def cut_behind(self) -> None:
        """Make an inner value the only output: the earliest that still fails, by halves."""
        nodes = _typed_nodes(self.best)
        low, high = 0, len(nodes)  # everything before `low` does not fail as far as is known
        while low < high:
            middle = (low + high) // 2
            name = nodes[middle].outputs[0].name or ""
            if self._try(_with_outputs(self.best, [name]), f"only %{name}"):
                high = middle
            else:
                low = middle + 1

    def step_back(self) -> bool:
        """Make what the last node takes the only output, as long as that fails too.

        Returns:
            Whether any cut was kept.
        """
        size = len(self.best.graph)
        while (last := self.best.graph.outputs[0].producer()) is not None:
            inner = [v for v in last.inputs if v is not None and (made := v.producer()) is not None and _is_cut(made)]
            if not any(self._try(_with_outputs(self.best, [str(v.name)]), f"only %{v.name}") for v in inner):
                break
        return len(self.best.graph) < size

    def cut_before(self) -> bool:
        """Make inner values inputs, those nearest to the output first, so that the first cuts take most away.

        Returns:
            Whether any cut was kept.
        """
        size = len(self.best.graph)
        for node in reversed(_typed_nodes(self.best)):
            name = node.outputs[0].name or ""
            if any(n.outputs[0].name == name for n in self.best.graph):
                self._try(_with_input(self.best, name), f"%{name} as an input")
        return len(self.best.graph) < size

    def _try(self, candidate: Module | None, what: str) -> bool:
        if candidate is None or self.count >= self._trials or len(candidate.graph) == 0:
            return False
        self.count += 1
        failure = attempt(candidate, self._pipeline, self._data.check, seed=self._data.seed)
        if self._was.like(failure):
            self.best = candidate
            if self.passing is not None and not _names(self.passing) <= _names(candidate):
                self.passing = None  # it has what the best has not: it is no neighbor any more
            self._say(f"{len(candidate.graph)} nodes: {what}")
            return True
        if failure is None and (self.passing is None or len(candidate.graph) > len(self.passing.graph)):
            self.passing = candidate
        return False


def _names(module: Module) -> set[str | None]:
    return {n.outputs[0].name for n in module.graph}


def _typed_nodes(module: Module) -> list[ir.Node]:
    """Nodes that the graph can be cut at."""
    return [node for node in module.graph if _is_cut(node)]


def _is_cut(node: ir.Node) -> bool:
    """Whether a node has one result, which could stand in an interface."""
    return len(node.outputs) == 1 and _fits(node.outputs[0])


def _fits(value: ir.Value) -> bool:
    dims = value.shape.dims if value.shape is not None else (None,)
    known = all(isinstance(d, int) or (d is not None and d.value is not None and d.value.isidentifier()) for d in dims)
    return bool(value.name) and value.dtype is not None and known


def _with_outputs(module: Module, names: Sequence[str]) -> Module | None:
    """A copy with these outputs only; `None` when one is no value of the graph."""
    copy = module.clone()
    values = {v.name: v for v in (*(v for n in copy.graph for v in n.outputs), *copy.graph.inputs)}
    if not all(n in values for n in names):
        return None
    copy.graph.outputs[:] = [values[n] for n in names]
    return _tidy(copy, names)


def _with_input(module: Module, name: str) -> Module | None:
    """A copy in which an inner value is an input; `None` when it is an output, which would leave nothing to compute."""
    copy = module.clone()
    node = next(n for n in copy.graph if n.outputs[0].name == name)
    old = node.outputs[0]
    if old.is_graph_output():
        return None
    new = ir.val(name, shape=old.shape, dtype=old.dtype)
    old.name = None
    old.replace_all_uses_with(new)
    copy.graph.inputs.append(new)
    return _tidy(copy, [v.name or "" for v in copy.graph.outputs])


def _tidy(module: Module, outputs: Iterable[str]) -> Module:
    """Drop what nothing uses, states without their output, inputs without a reader, and properties that tell of a port
    that is cut off; declare the dims that remain."""
    kept = set(outputs)
    module.residents = [r for r in module.residents if not r.retained or r.output in kept]
    common.RemoveUnusedNodesPass()(module.model)
    needed = {r.input for r in module.residents if r.retained}
    for index in reversed(range(len(module.graph.inputs))):
        value = module.graph.inputs[index]
        if not value.uses() and not value.is_graph_output() and value.name not in needed:
            del module.graph.inputs[index]
    operators.attach(module.model)
    module.properties = {name for name in module.properties if _can_be_asked(name, module)}
    for value in (*module.graph.inputs, *module.graph.outputs):
        for dim in value.shape or ():
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value not in module.dims:
                module.dims[dim.value] = Dim(dim.value)
    symbols = {
        d.value for v in (*module.graph.inputs, *module.graph.outputs) for d in v.shape or () if not isinstance(d, int)
    }
    if any(s is not None and s not in x.symbols for s in symbols for x in module.specializations):
        module.specializations = []  # they give no size to a dim that only an inner value had
    return module


def _can_be_asked(name: str, module: Module) -> bool:
    try:
        properties.problem(name, module)
    except QeffError:
        return False
    return True
