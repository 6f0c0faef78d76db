"""Lower attention to the form that a target runs best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect
from qeff_ir.passing.scores import Scores


@register
@dataclass(frozen=True, slots=True)
class Attention(Pass):
    """Lower captured attention.

    ``impl=grouped`` writes it as matrix products and a softmax, with the query heads of a group in an axis of their
    own, so that keys and values are never copied per query head. ``impl=standard`` keeps the standard `Attention` op
    and lowers only what it cannot express (attention sinks).

    Scale, soft-cap, windows (in the mask), sinks, and values narrower than keys are all kept.
    """

    name: ClassVar[str] = "attention"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"attention-lowered"})
    expect: ClassVar[Expect] = AllSites()
    idempotent: ClassVar[bool] = True

    impl: Literal["grouped", "standard"] = field(default="grouped", metadata={"help": "form of the result"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Lower every attention node.

        Raises:
            PassError: The number of heads is not known, or attention counts tokens by itself.
        """
        for node in self.sites(module):
            rule = "sinks" if node.op_type == "SinkAttention" else "grouped"
            rewriter.replace(node, _grouped(node, rewriter.at(node)), rule)
        rewriter.sweep()
        operators.attach(module.model)

    def sites(self, module: Module) -> list[ir.Node]:
        """Attention with sinks; with ``impl=grouped`` the standard op too."""
        lowered = {(dialect.DOMAIN, "SinkAttention"), *([("", "Attention")] if self.impl == "grouped" else ())}
        return [node for node in module.graph if (node.domain, node.op_type) in lowered]


def _grouped(node: ir.Node, b: OpBuilder) -> ir.Value:
    """Attention over ``[batch, kv_heads, group, seq, head_dim]``; returns ``[batch, heads, seq, value_dim]``."""
    parts = Scores.of(node, b)
    scores = parts.of_keys(parts.queries(), parts.keys, parts.mask)
    sinks = parts.sinks()
    weights = b("Softmax", scores, axis=-1) if sinks is None else _softmax_with_sinks(scores, sinks, b)
    return parts.joined(parts.mixed(weights, parts.values))


def _softmax_with_sinks(scores: ir.Value, sinks: ir.Value, b: OpBuilder) -> ir.Value:
    """A softmax in which each head has one more logit, whose weight is dropped."""
    rows = b("Slice", scores, b.const([0]), b.const([1]), b.const([4]))
    column = b("Add", b("Mul", rows, b.const(0.0, np.float32)), sinks)
    weights = b("Softmax", b("Concat", scores, column, axis=-1), axis=-1)
    return b("Slice", weights, b.const([0]), b.const([-1]), b.const([4]))
