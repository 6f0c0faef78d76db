"""A pass written as onnxscript rewrite rules: patterns as code, counted, with a reason for each that did not match."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer, MatchStatus

from qeff_ir.errors import PassError
from qeff_ir.module import Module
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.report import Missed
from qeff_ir.printer import structure

if TYPE_CHECKING:
    from onnxscript.rewriter import RewriteRule
    from onnxscript.rewriter._basics import MatchInfo

_REACH = 12
"""Most steps from a site down to the node at which a pattern that covers the site can end."""


class RulePass(Pass):
    """A pass whose rules are applied until none matches.

        def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
            return {"Swish": [pattern.RewriteRule(match, replacement)]}

    The names are what the report counts by. With `sites`, a site that is left over is reported with the rule that got
    furthest, how far, and what stopped it.
    """

    __slots__ = ()

    @abstractmethod
    def rules(self) -> Mapping[str, Sequence[RewriteRule]]:
        """The rules, by the name that each application counts under."""

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Apply the rules, in the order of their names' first mention, until nothing changes.

        Raises:
            PassError: Rules undo each other.
        """
        rules = self.rules()
        seen: set[str] = set()
        while True:
            fired = [name for name, group in rules.items() if rewriter.apply_rules(name, group)]
            if not fired or rewriter.refused:
                return
            now = structure(module)
            if now in seen:
                raise PassError(f"the rules {' and '.join(map(repr, fired))} undo each other")
            seen.add(now)

    def explain(self, module: Module, site: ir.Node) -> Missed:
        """Why the rules left a site alone, told by the rule that got furthest."""
        attempts = [
            (name, match)
            for name, group in self.rules().items()
            for rule in group
            for root in _below(site)
            for match in _attempts(rule, module, root)
            if site in match.match_result.nodes
        ]
        if not attempts:
            return Missed.at(site, "no rule got as far as this node", code="no-match")
        name, match = max(attempts, key=lambda attempt: attempt[1].score())
        result = match.match_result
        where = "".join(f" at {_spelled(v)}" for v in result.failure_nodes_and_values[:1])
        reason = " ".join(result.reason.split()).rstrip(".") or "the condition does not hold"
        code = "condition" if match.status is MatchStatus.CONDITION_FAILED else "no-match"
        reached = f"rule '{name}' matched {len(result.nodes)} nodes, the deepest {_spelled(result.nodes[-1])}"
        return Missed.at(site, reason + where, code=code, reached=reached)


def _attempts(rule: RewriteRule, module: Module, root: ir.Node) -> list[MatchInfo]:
    """How far a rule gets at one node; nothing when it does not even match the node."""
    tracer = MatchingTracer()
    rule.match(module.model, module.graph, root, tracer=tracer)
    return tracer.best_matches_map.get(rule, [])


def _below(site: ir.Node) -> Iterator[ir.Node]:
    """The site, and the nodes that its result reaches in a few steps, nearest first."""
    level, seen = [site], {site}
    for _ in range(_REACH):
        yield from level
        level = [user for node in level for out in node.outputs for user in out.consumers() if user not in seen]
        level = list(dict.fromkeys(level))
        seen.update(level)


def _spelled(what: ir.Node | ir.Value) -> str:
    node = what if isinstance(what, ir.Node) else what.producer()
    return f"'{what.name}'" if node is None else f"{node.op_type} '{node.outputs[0].name}'"
