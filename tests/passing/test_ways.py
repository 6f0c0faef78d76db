"""The three ways to write a pass get the same: options, counting, budgets, provenance, and the same result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRule

from qeff_ir.errors import PassError
from qeff_ir.ir.module import PASS_KEY, SOURCE_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.printer import structure, to_text
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.rules import RulePass
from qeff_ir.passing.surgeon import SurgeonPass
from tests import support


@dataclass(frozen=True, slots=True)
class AgainstIR(Pass):
    name: ClassVar[str] = "flip"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for node in [n for n in module.graph if n.op_type == "Add"]:
            rewriter.replace(node, rewriter.at(node)("Sub", *node.inputs), "Sub")


@dataclass(frozen=True, slots=True)
class ByRules(RulePass):
    name: ClassVar[str] = "flip"

    def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
        return {"Sub": [RewriteRule(lambda op, x, y: op.Add(x, y), lambda op, x, y: op.Sub(x, y))]}


@dataclass(frozen=True, slots=True)
class BySurgery(SurgeonPass):
    name: ClassVar[str] = "flip"

    def edit(self, graph: gs.Graph) -> Iterator[str]:
        for node in graph.nodes:
            if node.op == "Add":
                yield "Sub"
                node.op = "Sub"


@dataclass(frozen=True, slots=True)
class Untouched(SurgeonPass):
    name: ClassVar[str] = "untouched"

    def edit(self, graph: gs.Graph) -> None:
        graph.nodes[0].name = "first"


@pytest.mark.parametrize("way", [ByRules, BySurgery])
@pytest.mark.parametrize("budget", [None, 0, 2])
def test_all_ways_give_the_same_graph(way: type[Pass], budget: int | None) -> None:
    budgets = {} if budget is None else {"flip": budget}
    expected, got = support.canonical("qwen2"), support.canonical("qwen2")
    run_pipeline(expected, Pipeline((AgainstIR(),)), budgets=budgets)
    (run,) = run_pipeline(got, Pipeline((way(),)), budgets=budgets, check=3).runs
    assert structure(got) == structure(expected)
    flipped = [n for n in got.graph if n.metadata_props.get(PASS_KEY) == "flip"]
    assert len(flipped) == run.rewrites == run.stats.fired["Sub"] > 2 or budget is not None
    sources = [n.metadata_props[SOURCE_KEY] for n in expected.graph if n.metadata_props.get(PASS_KEY) == "flip"]
    assert [n.metadata_props[SOURCE_KEY] for n in flipped] == sources


def test_graphsurgeon_keeps_all_that_it_does_not_show() -> None:
    module = support.canonical("llama")
    support.apply(module, "fuse-norms,fuse-activations")
    before, weights = to_text(module), {n: v.const_value for n, v in module.graph.initializers.items()}
    (run,) = run_pipeline(module, Pipeline((Untouched(),)), check=3).runs
    assert (to_text(module), run.modified, run.stats.fired) == (before, False, {"edit": 1})
    found = module.graph.initializers
    assert all(found[n].const_value is tensor for n, tensor in weights.items())
    assert sum(WEIGHT_KEY in v.metadata_props for v in found.values()) > 10


def test_graphsurgeon_leaves_large_constants_what_they_are() -> None:
    """They are hidden from it as weights are, and are no inputs afterwards."""
    module = support.canonical("llama")
    node = next(n for n in module.graph if n.op_type == "Mul")
    large = ir.val("large", const_value=ir.tensor(np.full((32, 32), 1.0, np.float32), name="large"))
    module.graph.register_initializer(large)
    out = Rewriter(module, "fault").at(node)("MatMul", node.inputs[0], large)
    node.replace_input_with(0, out)
    inputs, tensor = [v.name for v in module.graph.inputs], large.const_value
    run_pipeline(module, Pipeline((Untouched(),)))
    assert [v.name for v in module.graph.inputs] == inputs
    assert module.graph.initializers["large"].const_value is tensor


def _add(op: Any, x: Any, y: Any) -> Any:
    return op.Add(x, y)


def _sub(op: Any, x: Any, y: Any) -> Any:
    return op.Sub(x, y)


def test_rules_that_undo_each_other_are_named() -> None:
    @dataclass(frozen=True, slots=True)
    class Seesaw(RulePass):
        name: ClassVar[str] = "seesaw"

        def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
            return {"up": [RewriteRule(_add, _sub)], "down": [RewriteRule(_sub, _add)]}

    module = support.canonical("llama")
    before = to_text(module)
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline((Seesaw(),)))
    assert str(error.value) == "pass seesaw: the rules 'up' and 'down' undo each other"
    assert to_text(module) == before


def test_a_pass_that_undoes_another_is_named() -> None:
    @dataclass(frozen=True, slots=True)
    class Back(RulePass):
        name: ClassVar[str] = "back"

        def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
            return {"Add": [RewriteRule(_sub, _add)]}

    module = support.canonical("llama")
    assert not any(n.op_type == "Sub" for n in module.graph)
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline((AgainstIR(), Back())), check=2)
    assert str(error.value) == (
        "pass back: it undoes flip: the graph is again what it was at the beginning; drop one of the two"
    )
