"""The rewriter: budgets admit the first rewrites only, and a pass that does not end is stopped and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import pytest
from onnxscript.rewriter import pattern

from qeff_ir.errors import PassError, PipelineError
from qeff_ir.ir.module import CHANGED_KEY, PASS_KEY, SOURCE_KEY, Module
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support
from tests.adapters.random_adapters import base
from tests.adapters.random_adapters import make as make_adapter


@pytest.fixture
def module() -> Module:
    return support.canonical("llama")


def make(run: Callable[[Module, Rewriter], None]) -> Pipeline:
    """A pipeline of one pass, not registered, that does `run`."""

    @dataclass(frozen=True, slots=True)
    class Made(Pass):
        name: ClassVar[str] = "made"

        def run(self, module: Module, rewriter: Rewriter) -> None:
            run(module, rewriter)

    return Pipeline((Made(),))


def ops(module: Module, op_type: str) -> int:
    return sum(n.op_type == op_type for n in module.graph)


def negate_sums(module: Module, rewriter: Rewriter) -> None:
    for node in [n for n in module.graph if n.op_type == "Add"]:
        rewriter.replace(node, rewriter.at(node)("Sub", *node.inputs))


def _sum(op: Any, x: Any, y: Any) -> Any:
    return op.Add(x, y)


def _difference(op: Any, x: Any, y: Any) -> Any:
    return op.Sub(x, y)


def negate_by_rule(module: Module, rewriter: Rewriter) -> None:
    rewriter.apply_rules("Sub", [pattern.RewriteRule(_sum, _difference)])


def negate_by_guard(module: Module, rewriter: Rewriter) -> None:
    for node in [n for n in module.graph if n.op_type == "Add"]:
        if rewriter.rewrite("Sub"):
            rewriter.substitute(node, rewriter.at(node)("Sub", *node.inputs))


@pytest.mark.parametrize("way", [negate_sums, negate_by_rule, negate_by_guard])
def test_a_budget_admits_the_first_rewrites_only(module: Module, way: Callable[[Module, Rewriter], None]) -> None:
    pipeline, sums = make(way), ops(module, "Add")
    assert sums > 3
    (run,) = run_pipeline(module.clone(), pipeline).runs
    assert (run.rewrites, sum(run.stats.fired.values())) == (sums, sums)
    for budget in (0, 1, 3, sums, sums + 1):
        changed = module.clone()
        (run,) = run_pipeline(changed, pipeline, budgets={"made": budget}).runs
        assert run.rewrites == ops(changed, "Sub") - ops(module, "Sub") == min(budget, sums)
        assert ops(changed, "Add") == sums - min(budget, sums)
        assert run.modified == (budget > 0)


def test_the_admitted_rewrites_are_those_of_the_full_run(module: Module) -> None:
    full, part = module.clone(), module.clone()
    run_pipeline(full, make(negate_sums))
    run_pipeline(part, make(negate_sums), budgets={"made": 3})
    changed = [n.metadata_props["qeff.source"] for n in part.graph if n.metadata_props.get("qeff.pass") == "made"]
    everything = [n.metadata_props["qeff.source"] for n in full.graph if n.metadata_props.get("qeff.pass") == "made"]
    assert changed == everything[:3]


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_every_stock_pass_leaves_a_valid_module_at_every_budget(module: Module, target: str) -> None:
    for id, item in Pipeline.parse(support.rest_of(target)):
        full = module.clone()
        (run,) = run_pipeline(full, Pipeline((item,))).runs
        for budget in range(run.rewrites):
            (part,) = run_pipeline(module.clone(), Pipeline((item,)), budgets={id: budget}).runs
            assert part.rewrites == budget
        module = full


@pytest.mark.parametrize(
    "step",
    [
        "token-embedding",
        "lora{n=2 rank=2 bias=all retained=true}",
        "lora{mode=single rank=2 targets=wte}",
        "merge-lora{adapter=FOLDER}",
    ],
)
def test_the_passes_beside_the_stock_ones_keep_to_their_budgets(step: str, tmp_path: Path) -> None:
    module = support.canonical("gpt2")
    make_adapter(base("gpt2"), tmp_path, 0, r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    pipeline = Pipeline.parse(step.replace("FOLDER", str(tmp_path)))
    ((id, _),) = pipeline
    (run,) = run_pipeline(module.clone(), pipeline).runs
    assert run.modified and run.rewrites > 0
    for budget in range(run.rewrites):
        part = module.clone()
        (less,) = run_pipeline(part, pipeline, budgets={id: budget}).runs
        assert less.rewrites == budget
        changed = [v for v in part.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)]
        assert all(CHANGED_KEY in v.metadata_props for v in changed)
        marked = [n for n in part.graph if n.metadata_props.get(PASS_KEY) == id]
        assert len(changed) == budget if id == "merge-lora" else bool(marked) == (budget > 0)


def test_an_input_in_the_place_of_an_output_keeps_its_name(module: Module) -> None:
    rewriter = Rewriter(module, "made")
    made, given = module.output("logits").producer(), module.input("position_ids")
    assert made is not None
    rewriter.replace(made, given)
    assert module.input("position_ids") is given and module.output("logits").producer() is not None


def test_nodes_after_an_anchor_follow_each_other(module: Module) -> None:
    node = next(n for n in module.graph if n.op_type == "MatMul")
    b = Rewriter(module, "made").after(node)
    first = b("Neg", node.outputs[0])
    second = b("Abs", first)
    order = list(module.graph)
    at = order.index(node)
    assert order[at + 1 : at + 3] == [first.producer(), second.producer()]
    assert order[at + 1].metadata_props[PASS_KEY] == "made"
    assert order[at + 2].metadata_props[SOURCE_KEY] == node.metadata_props[SOURCE_KEY] != ""


def test_a_budget_for_an_unknown_pass_is_refused(module: Module) -> None:
    with pytest.raises(PipelineError) as error:
        run_pipeline(module, make(negate_sums), budgets={"mad": 1})
    assert str(error.value) == "there is a budget for 'mad', but no such pass in the pipeline"


def spin(module: Module, rewriter: Rewriter) -> None:
    while True:
        rewriter.rewrite("spin")


def flip_flop(module: Module, rewriter: Rewriter) -> None:
    while True:
        rewriter.rewrite("there")
        rewriter.rewrite("back")


@pytest.mark.parametrize(
    ("loop", "suspects"),
    [(spin, "the last were of 'spin'"), (flip_flop, "the rules 'back' and 'there' undo each other")],
)
def test_a_pass_that_rewrites_forever_is_named(
    module: Module, loop: Callable[[Module, Rewriter], None], suspects: str
) -> None:
    limit = 1000 + 20 * len(module.graph)
    with pytest.raises(PassError) as error:
        run_pipeline(module, make(loop))
    assert str(error.value) == f"pass made: it has made {limit} rewrites and does not end; {suspects}"


def test_a_pass_that_inserts_forever_is_named(module: Module) -> None:
    def grow(module: Module, rewriter: Rewriter) -> None:
        b = rewriter.at(next(iter(module.graph)))
        while True:
            b("Neg", module.graph.inputs[0])

    limit = 1000 + 20 * len(module.graph)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qeff_ir.passing.rewriter._NODES_PER_REWRITE", 1)
        with pytest.raises(PassError) as error:
            run_pipeline(module, make(grow))
    assert str(error.value) == f"pass made: it has inserted {limit} nodes and does not end; the last was Neg"
