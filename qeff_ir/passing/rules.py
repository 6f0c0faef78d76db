"""A pass written as onnxscript rewrite rules: patterns as code, counted, with a reason for each that did not match."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer, MatchStatus

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import structure
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.report import Missed

if TYPE_CHECKING:
    from onnxscript.rewriter import RewriteRule
    from onnxscript.rewriter._basics import MatchInfo

_REACH = 12
"""Most steps from a site down to the node at which a pattern that covers the site can end."""

_NEAR = 3
"""Most steps to the end of a pattern that did not come to the site: one further away was hardly meant for it."""


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
        """Why the rules left a site alone, told by the rule that got furthest.

        A rule is matched from its last node up: one that stops before it comes to the site is told too, the nearest.
        """
        attempts = [
            (covers, 0 if covers else -steps, match.score(), name, match)
            for name, group in self.rules().items()
            for rule in group
            for steps, root in _below(site)
            for match in _attempts(rule, module, root)
            if (covers := site in match.match_result.nodes) or steps <= _NEAR
        ]
        if not attempts:
            return Missed.at(site, "no rule got as far as this node", code="no-match")
        covers, *_, name, match = max(attempts, key=lambda attempt: attempt[:3])
        result = match.match_result
        where = "".join(f" at {_spelled(v)}" for v in result.failure_nodes_and_values[:1])
        reason = " ".join(result.reason.split()).rstrip(".") or _REASONS[match.status]
        code = "condition" if match.status is MatchStatus.CONDITION_FAILED else "no-match"
        count = "1 node" if len(result.nodes) == 1 else f"{len(result.nodes)} nodes"
        end = (result.nodes or (match.root_node,))[-1]
        way = f"matched {count}, the deepest {_spelled(end)}"
        if not covers:
            way = f"matched {count} up from {_spelled(match.root_node)} and did not come to this node"
        return Missed.at(site, reason + where, code=code, reached=f"rule '{name}' {way}")


_REASONS = {
    MatchStatus.NO_MATCH: "the pattern does not match",
    MatchStatus.CONDITION_FAILED: "the condition does not hold",
    MatchStatus.REPLACEMENT_FAILED: "the replacement cannot be made",
    MatchStatus.SUCCESS: "the rule matches by now, but was not applied",
}
"""Why a rule stopped, where it gives no reason itself."""


def _attempts(rule: RewriteRule, module: Module, root: ir.Node) -> list[MatchInfo]:
    """How far a rule gets at one node; nothing when it does not even match the node."""
    tracer = MatchingTracer()
    rule.match(module.model, module.graph, root, tracer=tracer)
    return tracer.best_matches_map.get(rule, [])


def _below(site: ir.Node) -> Iterator[tuple[int, ir.Node]]:
    """The site, and the nodes that its result reaches in a few steps, nearest first, each with its steps."""
    level, seen = [site], {site}
    for steps in range(_REACH):
        yield from ((steps, node) for node in level)
        level = [user for node in level for out in node.outputs for user in out.consumers() if user not in seen]
        level = list(dict.fromkeys(level))
        seen.update(level)


def _spelled(what: ir.Node | ir.Value) -> str:
    node = what if isinstance(what, ir.Node) else what.producer()
    return f"'{what.name}'" if node is None else f"{node.op_type} '{node.outputs[0].name}'"
