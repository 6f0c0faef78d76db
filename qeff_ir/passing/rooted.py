"""Rules that are tried only at nodes where they can match: the operator of a pattern's last node, looked up first.

onnxscript tries each rule at each node, and builds the record of a match before it compares the operators; with a few
dozen rules, that is most of what rewriting costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter._pattern_ir import StringConstantPattern

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter import RewriteRule


def root_operator(rule: RewriteRule) -> str | None:
    """Operator of the last node of a rule's pattern; `None` where it may be one of several, or is not known."""
    nodes: list[Any] = list(getattr(getattr(rule, "_target_pattern", None), "output_nodes", ()))
    operator: object = nodes[0].op if len(nodes) == 1 else None
    return operator.value() if isinstance(operator, StringConstantPattern) else None


class Rooted:
    """Stands for a rule in a rule set.

    Args:
        rule: The rule.
    """

    def __init__(self, rule: RewriteRule) -> None:
        self._rule = rule
        self._root = root_operator(rule)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **kwargs: Any) -> Any:
        """The replacement when the rule matches, else `None`, which leaves the node alone."""
        if self._root is not None and node.op_type != self._root:
            return None
        return self._rule.try_rewrite(model, graph, node, **kwargs)


def rooted(rules: Iterable[RewriteRule]) -> RewriteRuleSet:
    """A set of these rules."""
    return RewriteRuleSet(cast("list[RewriteRule]", [Rooted(rule) for rule in rules]))
