"""A pass that derives weights: products of one value with several weights become one, and its result is split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.sources import sources_of
from qeff_ir.passing import AllSites, Expect, Pass, Phase, Rewriter
from qeff_ir.passing.weights import Stored, side_by_side, stored


@dataclass(frozen=True, slots=True)
class FuseProducts(Pass):
    """``MatMul(x, A)`` and ``MatMul(x, B)`` become ``Split(MatMul(x, [A B]))`` where both are in one module.

    Gate and up projection, say, or queries, keys and values; the weights are put side by side when they are written. A
    weight that another product reads too stays alone.
    """

    name: ClassVar[str] = "fuse-products"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_weights: ClassVar[bool] = True
    expect: ClassVar[Expect] = AllSites()

    def sites(self, module: Module) -> list[ir.Node]:
        """The first product of each group."""
        return [group[0] for group in _groups(module)]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Fuse each group."""
        for group in _groups(module):
            if rewriter.rewrite(f"{len(group)} products"):
                _fuse(group, rewriter)
        rewriter.sweep()


def _groups(module: Module) -> list[list[ir.Node]]:
    """Products of the same value below the same module, with weights of their own."""
    found: dict[tuple[ir.Value | None, str], list[ir.Node]] = {}
    for node in module.graph:
        weight = stored(node)
        if weight is not None and len(list(_products(weight))) == 1:
            found.setdefault((node.inputs[0], _parent(node)), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _products(weight: Stored) -> Iterable[ir.Node]:
    for user in weight.value.consumers():
        yield from user.outputs[0].consumers() if user.op_type == "Transpose" else [user]


def _parent(node: ir.Node) -> str:
    return next(iter(sources_of(node)), "").rpartition(".")[0]


def _fuse(group: list[ir.Node], rewriter: Rewriter) -> None:
    first, x = group[0], group[0].inputs[0]
    parts = [part for node in group if (part := stored(node)) is not None]
    own = [source.rpartition(".")[2] for node in group for source in sources_of(node)]
    both = side_by_side(rewriter, f"{_parent(first)}.{'_and_'.join(own)}.weight", parts)
    b = rewriter.at(*group)
    weight = b("Transpose", both.value, perm=[1, 0]) if both.transposed else both.value
    product = b("MatMul", x, weight)
    sizes = b.const([part.features[1] for part in parts])
    split = b.several("Split", product, sizes, axis=-1, shapes=[None] * len(parts))
    for node, value in zip(group, split, strict=True):
        rewriter.substitute(node, value)
