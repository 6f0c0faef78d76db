"""Rules that are looked up by their last operator do what they do when they are tried everywhere."""

from __future__ import annotations

import pytest
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from passes import canonicalize
from qeff_ir.ir.printer import to_text
from qeff_ir.passing.base import registered_passes
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.rooted import Rooted, root_operator, rooted
from qeff_ir.passing.rules import RulePass
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import prepare
from tests.properties import LONG, RICH


def test_every_stock_rule_has_a_known_root() -> None:
    """Tells when the private names of onnxscript's patterns move."""
    rules = list(canonicalize._RULES)
    for cls in registered_passes().values():
        if issubclass(cls, RulePass):
            rules += [rule for group in cls().rules().values() for rule in group]
    assert len(rules) > 30
    assert all(root_operator(rule) for rule in rules)


def test_the_root_is_the_last_operator() -> None:
    rule = RewriteRule(lambda op, x: op.Mul(op.Sigmoid(x), x), lambda op, x: op.Swish(x))
    assert root_operator(rule) == "Mul"
    assert [root_operator(r) for r in rule.commute()] == ["Mul", "Mul"]


@pytest.mark.parametrize("index", range(len(RICH)))
def test_nothing_is_lost(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    for rules in (canonicalize._RULES, RewriteRuleSet([r._rule for r in canonicalize._RULES])):  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(canonicalize, "_RULES", rules)
        module = prepare(build(RICH[index]).module, LONG)
        run_pipeline(module, Pipeline.parse("canonicalize"))
        texts.append(to_text(module))
    assert texts[0] == texts[1]


def test_a_wrong_root_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill test: rules that are tried in the wrong places leave the graph alone."""
    found: list[int] = []
    for root in (None, "Loop"):
        module = prepare(build(RICH[1]).module, LONG)
        rules = rooted(r._rule for r in canonicalize._RULES)  # pyright: ignore[reportAttributeAccessIssue]
        for rule in rules:
            assert isinstance(rule, Rooted)
            rule._root = root or rule._root
        monkeypatch.setattr(canonicalize, "_RULES", rules)
        found.append(canonicalize._RULES.apply_to_model(module.model))
    assert found[0] > found[1] == 0
