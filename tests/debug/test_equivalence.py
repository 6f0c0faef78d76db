"""The numeric check passes what is right, and names what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from backends import backend_names
from qeff_ir.debug.drive import drive, make_plan
from qeff_ir.debug.equivalence import Equivalence, error_of
from qeff_ir.errors import PassError, PipelineError, QeffError, RuntimeInputError
from qeff_ir.ir.module import Module, Specialization
from qeff_ir.ir.ports import LOGITS, POSITIONS
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support

from .models import plain


def check(module: Module, pipeline: str) -> Equivalence:
    numeric = Equivalence()
    run_pipeline(module, Pipeline.parse(pipeline), instruments=[numeric])
    return numeric


@pytest.mark.parametrize("target", backend_names())
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss", "bloom"])
def test_the_stock_passes_are_equivalent(name: str, target: str) -> None:
    """Through rings, physical caches, last-token logits, device ops with indices out of range, and another opset."""
    numeric = check(support.canonical(name), support.rest_of(target))
    assert numeric.errors.keys() >= {"fuse-norms", "last-logits", "kv-retention"}
    assert 0 < max(numeric.errors.values()) <= numeric.limit < 1e-4


def test_a_module_without_specializations_gets_small_sizes() -> None:
    module = support.lowered("mistral")
    assert not module.specializations
    plan = make_plan(module)
    assert [run.tokens.shape for run in plan.runs] == [(2, 4)] * 5 + [(2, 1)] * 3 + [(2, 2)]
    assert (plan.runs[0].positions[1] == -1).all()  # the shorter prompt idles in the first chunks
    assert set(check(module, "canonicalize,fuse-norms").errors) == {"canonicalize", "fuse-norms"}


def test_level_4_drives_from_python_too() -> None:
    module = support.canonical("llama")
    with pytest.raises(PassError, match=r"pass flipped-sign: .*it changed behavior"):
        run_pipeline(module, Pipeline.parse("fuse-norms,flipped-sign"), check=4)
    assert run_pipeline(support.canonical("llama"), Pipeline.parse("fuse-norms"), check=4).runs[0].modified


@dataclass(frozen=True, slots=True)
class LosesASlot(Pass):
    """Does not store the token of one position."""

    name: ClassVar[str] = "loses-a-slot"
    position: int = 0

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for node in [node for node in module.graph if node.op_type == "CacheUpdate"]:
            b, positions = rewriter.at(node), node.inputs[2]
            if rewriter.rewrite("slot"):
                lost = b("Equal", positions, b.const(self.position))
                node.replace_input_with(2, b("Where", lost, b.const(-1), positions))


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("position", [0, 20, 46, 47])
def test_every_slot_is_driven_up_to_the_last(name: str, position: int) -> None:
    module = support.canonical(name)
    assert {s.symbols["ctx_len"] for s in module.specializations} == {48}
    with pytest.raises(PassError, match="it changed behavior"):
        run_pipeline(module, Pipeline((LosesASlot(position),)), check=4)
    run_pipeline(module, Pipeline((LosesASlot(48),)), check=4)


@dataclass(frozen=True, slots=True)
class SpoilsDrafts(Pass):
    """Doubles the logits of all tokens but the last of each row."""

    name: ClassVar[str] = "spoils-drafts"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        node, positions = module.port(LOGITS).producer(), module.port(POSITIONS)
        assert node is not None
        b = rewriter.at(node)
        is_last = b("Equal", positions, b("ReduceMax", positions, b.const([1]), keepdims=1))
        factor = b("Where", b("Unsqueeze", is_last, b.const([2])), b.const(1.0, "float32"), b.const(2.0, "float32"))
        rewriter.replace(node, b("Mul", b("MatMul", *node.inputs), factor), "spoil")


def test_logits_of_drafts_are_compared_where_both_have_them() -> None:
    module = support.canonical("llama")
    with pytest.raises(PassError, match=r"'logits of a draft' of run \d+ differs by"):
        run_pipeline(module, Pipeline((SpoilsDrafts(),)), check=4)
    run_pipeline(module, Pipeline.parse("last-logits"), check=4)  # has them no more
    drafts = drive(support.canonical("llama"), make_plan(module)).drafts
    assert [None if d is None else d.shape for d in drafts] == [None] * (len(drafts) - 1) + [(2, 1, support.VOCAB)]


def test_a_trace_that_no_specialization_takes_is_told() -> None:
    """The graph would take it."""
    module = support.canonical("llama")
    plan = make_plan(module)
    module.set_size("batch_size", 5)
    with pytest.raises(RuntimeInputError, match="no compiled shapes take a run of 2 rows and seq_len=8 or more"):
        drive(module, plan)


def test_a_long_context_is_not_filled() -> None:
    module = support.canonical("llama")
    for chunk in (1, 2):
        module.specializations = [
            Specialization("Prefill", "prefill", {"batch_size": 1, "seq_len": chunk, "ctx_len": 64 * chunk})
        ]
        assert max(run.positions.max() for run in make_plan(module).runs) == 64 * chunk - 1
    module.specializations = [Specialization("Prefill", "prefill", {"batch_size": 1, "seq_len": 2, "ctx_len": 129})]
    assert [run.tokens.shape for run in make_plan(module).runs] == [(1, 2)] * 2 + [(1, 1)] * 3 + [(1, 2)]


def test_the_report_has_the_error_of_each_pass() -> None:
    module, numeric = support.canonical("llama"), Equivalence()
    report = run_pipeline(module, Pipeline.parse("canonicalize,fuse-norms"), instruments=[numeric], check=4)
    assert [run.stats.error for run in report.runs] == [0.0, numeric.errors["fuse-norms"]]
    assert [entry["error"] for entry in report.to_json()["passes"]] == [*numeric.errors.values()]
    assert numeric.errors["fuse-norms"] > 0.0
    report = run_pipeline(support.canonical("llama"), Pipeline.parse("fuse-norms"), check=2)
    assert report.runs[0].stats.error is None


@pytest.mark.parametrize("level", [-1, 5, 99, 1.5, "2", None])
def test_there_are_five_levels(level: Any) -> None:
    with pytest.raises(PipelineError, match=r"there is no check level .*: give a number from 0 to 4"):
        run_pipeline(support.canonical("llama"), Pipeline.parse("fuse-norms"), check=level)


def test_the_guilty_pass_is_named_and_undone() -> None:
    module = support.canonical("llama")
    with pytest.raises(
        PassError,
        match=r"^pass flipped-sign: \[equivalence\] it changed behavior: 'logits' of run \d differs by \d\.\de[+-]\d\d "
        r"of its rms, rounding explains \d\.\de-0\d$",
    ) as caught:
        check(module, "fuse-norms,flipped-sign,fuse-activations")
    assert caught.value.__cause__ is not None
    assert {n.op_type for n in module.graph} >= {"RMSNormalization"}
    assert "Sub" not in {n.op_type for n in module.graph if n.metadata_props.get("qeff.pass") == "flipped-sign"}


@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_tokens_looked_up_by_the_host(name: str) -> None:
    """The module after the pass takes vectors: those of its own table, or nothing would be equal."""
    numeric = check(support.canonical(name), "last-logits,token-embedding")
    assert numeric.errors["token-embedding"] <= numeric.limit < 1e-4
    alone = support.canonical(name)
    run_pipeline(alone, Pipeline.parse("token-embedding"))
    answers = drive(alone, make_plan(alone)).outputs[0]["logits"]
    assert np.ptp(answers) > 0.1
    other = drive(alone, make_plan(alone, seed=1)).outputs[0]["logits"]
    assert not np.array_equal(answers, other)


def test_a_cache_that_forgets_shows_in_the_steps_after() -> None:
    """States are carried over: the first run cannot see this fault."""
    module = support.canonical("llama")
    plan = make_plan(module)
    before = drive(module, plan)
    for node in module.graph:
        if node.op_type == "CacheUpdate":
            past = node.inputs[0]
            assert past is not None and past.dtype is not None
            zero = ir.node("Sub", [past, past])
            zero.outputs[0].shape, zero.outputs[0].dtype = past.shape, past.dtype
            module.graph.insert_before(node, zero)
            node.replace_input_with(0, zero.outputs[0])
    after = drive(module, plan)
    errors = [error_of(a["logits"], b["logits"]) for a, b in zip(after.outputs, before.outputs, strict=True)]
    assert errors[0] == 0.0
    assert errors[-1] > 0.01


def test_a_plain_graph_is_run_on_random_inputs(tmp_path: Path) -> None:
    module = plain(tmp_path)
    plan = make_plan(module)
    assert not plan.runs
    assert drive(module, plan).outputs[0]["y"].shape == (3, 3, 16)
    assert check(module, "canonicalize").errors["canonicalize"] <= 1e-6


def test_errors_of_numbers_that_say_little() -> None:
    one, two = np.ones(3, np.float32), np.full(3, 2, np.float32)
    assert error_of(one, one) == 0.0
    assert error_of(two, one) == np.inf
    assert error_of(np.ones(4, np.float32), one) == np.inf
    with pytest.raises(
        QeffError, match=r"^the module gives infinities or no numbers before the pass: its numbers cannot"
    ):
        error_of(one, np.array([1, np.nan, 2], np.float32))


def test_a_graph_that_cannot_run_is_said_to_be_one(tmp_path: Path) -> None:
    module = plain(tmp_path)
    next(n for n in module.graph if n.op_type == "Relu").op_type = "NoSuchOp"
    with pytest.raises(RuntimeInputError, match=r"^ONNX Runtime cannot load plain: .*NoSuchOp"):
        drive(module, make_plan(module))
    module = plain(tmp_path)
    plan = make_plan(module)
    plan.inputs["x"] = np.zeros((2, 2, 5), np.float32)  # pyright: ignore[reportIndexIssue]
    with pytest.raises(RuntimeInputError, match=r"^ONNX Runtime cannot run plain: .*x.*"):
        drive(module, plan)


def test_logits_without_a_width_are_refused() -> None:
    module = support.canonical("llama")
    module.output("logits").shape = ir.Shape(["batch_size", "seq_len", "vocab"])
    with pytest.raises(
        RuntimeInputError, match=r"^the logits of LlamaForCausalLM have no fixed width: no token can be"
    ):
        make_plan(module)
