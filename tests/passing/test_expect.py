"""Expectations: every way of firing too seldom is an error that lists the sites, the reasons and the origins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchResult, RewriteRule

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.expect import AllSites, AnyNumber, AtLeast, Exactly, Expect
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.rules import RulePass
from tests import support

PLACE = "model.layers.0.mlp.act_fn: Sigmoid 'val_136'"


@dataclass(frozen=True, slots=True)
class Some(Pass):
    """Rewrites the first few of the two gates of a llama."""

    name: ClassVar[str] = "some"
    limit: int = 1

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for node in self.sites(module)[: self.limit]:
            rewriter.replace(node, rewriter.at(node)("Tanh", *node.inputs), "Tanh")

    def sites(self, module: Module) -> list[ir.Node]:
        return [n for n in module.graph if n.op_type == "Sigmoid"]


@pytest.fixture
def module() -> Module:
    return support.canonical("llama")


def run(module: Module, item: Pass, expect: Expect, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The message of the failure, or `None`."""
    monkeypatch.setattr(type(item), "expect", expect)
    try:
        run_pipeline(module, Pipeline((item,)))
    except PassError as error:
        return str(error)
    return None


UNTOUCHED = "model.layers.1.mlp.act_fn: Sigmoid 'val_136.1' [untouched] the pass did not touch it"


@pytest.mark.parametrize(
    ("limit", "expect", "message"),
    [
        (2, AllSites(), None),
        (1, AllSites(), f"1 of 2 sites were not rewritten:\n  {UNTOUCHED}"),
        (2, Exactly(2), None),
        (2, Exactly("num_layers"), None),
        (1, Exactly("num_layers"), f"1 site was rewritten, exactly 2 (num_layers) must be:\n  {UNTOUCHED}"),
        (2, Exactly(1), "2 sites were rewritten, exactly 1 must be"),
        (2, Exactly("num_states"), "2 sites were rewritten, exactly 4 (num_states) must be"),
        (1, Exactly("layers"), "it expects 'layers' rewrites, which is none of num_layers, num_decoders, num_states"),
        (1, AtLeast(1), None),
        (1, AtLeast(2), f"1 site was rewritten, at least 2 must be:\n  {UNTOUCHED}"),
        (0, AnyNumber(), None),
    ],
)
def test_expectations(
    module: Module, limit: int, expect: Expect, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(module, Some(limit), expect, monkeypatch) == (message and f"pass some: {message}")


@dataclass(frozen=True, slots=True)
class InPlace(Some):
    """Changes the first few of the two gates of a llama, which stay."""

    name: ClassVar[str] = "in-place"
    said: int | None = None

    def run(self, module: Module, rewriter: Rewriter) -> None:
        gates = self.sites(module)
        for index, node in enumerate(gates[: self.limit]):
            if rewriter.rewrite("Tanh", *gates[index : index + 1 if self.said is None else self.said]):
                node.replace_input_with(0, rewriter.at(node)("Tanh", *node.inputs))


@pytest.mark.parametrize(
    ("item", "left"), [(InPlace(2), 0), (InPlace(1), 1), (InPlace(2, said=0), 2), (InPlace(1, said=2), 0)]
)
def test_sites_that_are_changed_in_place_are_done_where_the_pass_says_so(
    module: Module, item: InPlace, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = run(module, item, AllSites(), monkeypatch)
    assert (message or "").partition(" sites")[0] == (f"pass in-place: {left} of 2" if left else "")


def test_what_a_budget_refuses_is_not_done(module: Module) -> None:
    rewriter = Rewriter(module, "in-place", budget=1)
    InPlace(2).run(module, rewriter)
    assert (rewriter.refused, [site.outputs[0].name for site in rewriter.done]) == (True, ["val_136"])


def test_a_node_that_is_no_site_cannot_be_done(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(node for node in module.graph if node.op_type == "MatMul")
    monkeypatch.setattr(InPlace, "run", lambda self, module, rewriter: rewriter.rewrite("any", other))
    message = run(module, InPlace(), AnyNumber(), monkeypatch)
    assert message == (
        f"pass in-place: it says that it has changed MatMul '{other.outputs[0].name}' in place, which its 'sites' did "
        "not find before"
    )


def test_what_is_left_is_reported_where_any_number_is_fine(module: Module) -> None:
    (done,) = run_pipeline(module, Pipeline((Some(1),))).to_json()["passes"]
    assert (done["sites"], done["rewrites"]) == (2, 1)
    assert done["left"] == [
        {
            "source": "model.layers.1.mlp.act_fn",
            "node": "Sigmoid 'val_136.1'",
            "code": "untouched",
            "reason": "the pass did not touch it",
            "reached": "",
        }
    ]


def test_without_a_site_finder_rewrites_are_counted(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Some, "run", lambda self, module, rewriter: rewriter.rewrite("x") and None)
    monkeypatch.setattr(Some, "sites", Pass.sites)
    assert run(module, Some(), Exactly(1), monkeypatch) is None
    assert run(module, Some(), Exactly(2), monkeypatch) == "pass some: 1 site was rewritten, exactly 2 must be"


def test_a_budget_suspends_the_expectation(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Some, "expect", AllSites())
    run_pipeline(module, Pipeline((Some(2),)), budgets={"some": 1})


def gate(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Sigmoid(x))


def silu(op: Any, x: Any) -> Any:
    return op.Swish(x, alpha=1.0)


def wider(op: Any, x: Any, y: Any) -> Any:
    return op.Div(op.Mul(y, op.Sigmoid(x)), x)


def never(context: Any, x: ir.Value, **_: Any) -> MatchResult:
    return MatchResult().fail("the gate is too warm", x)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([RewriteRule(lambda op, x: op.Sqrt(x), silu)], "[no-match] no rule got as far as this node"),
        (
            [RewriteRule(lambda op, x: op.Mul(op.Sigmoid(x), x), silu)],
            "[no-match] OpType mismatch: expected Sigmoid, got MatMul at MatMul 'linear_4' "
            "(rule 'Swish' matched 1 node up from Mul 'silu' and did not come to this node)",
        ),
        (
            [RewriteRule(lambda op, x, y: op.MatMul(op.Mul(y, op.Tanh(x)), y), silu)],
            "[no-match] OpType mismatch: expected Tanh, got MatMul at MatMul 'linear_5' "
            "(rule 'Swish' matched 2 nodes up from MatMul 'linear_6' and did not come to this node)",
        ),
        (
            [RewriteRule(gate, silu, lambda context, x, **_: False)],
            "[condition] Condition function check failed (rule 'Swish' matched 2 nodes, the deepest Sigmoid 'val_136')",
        ),
        (
            [RewriteRule(gate, silu, never)],
            "[condition] the gate is too warm at MatMul 'linear_4' "
            "(rule 'Swish' matched 2 nodes, the deepest Sigmoid 'val_136')",
        ),
    ],
)
def test_a_rule_tells_how_far_it_got(
    module: Module, rules: list[RewriteRule], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, slots=True)
    class Gates(RulePass):
        name: ClassVar[str] = "gates"

        def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
            return {"Swish": rules}

        def sites(self, module: Module) -> list[ir.Node]:
            return [n for n in module.graph if n.op_type == "Sigmoid"]

    message = run(module, Gates(), AllSites(), monkeypatch)
    assert message is not None
    head, first, _ = message.split("\n")
    assert head == "pass gates: 2 of 2 sites were not rewritten:"
    assert first == f"  {PLACE} {why}"
