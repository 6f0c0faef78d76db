"""Passes with one fault each, for the tools that have to find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest

from qeff_ir.ir.module import Module
from qeff_ir.passing import base
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.expect import AllSites, Expect

FAULT = 3
"""The rewrite, from 1, that is wrong in every pass here."""


def residuals(module: Module) -> list[ir.Node]:
    """The additions of hidden states: two a layer in a plain decoder."""
    return [n for n in module.graph if n.op_type == "Add" and n.outputs[0].shape and len(n.outputs[0].shape) == 3]


@dataclass(frozen=True, slots=True)
class FlippedSign(Pass):
    """Write ``x + y`` as ``x - (-y)``, but the third as ``x - y``."""

    name: ClassVar[str] = "flipped-sign"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for number, node in enumerate(residuals(module), 1):
            b, out = rewriter.at(node), node.outputs[0]
            y = node.inputs[1] if number == FAULT else b("Neg", node.inputs[1], shape=out.shape, dtype=out.dtype)
            rewriter.replace(node, b("Sub", node.inputs[0], y), "add-to-sub")


@dataclass(frozen=True, slots=True)
class Raises(Pass):
    """Replace additions by themselves, and raise at the third."""

    name: ClassVar[str] = "raises"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for number, node in enumerate(residuals(module), 1):
            b = rewriter.at(node)
            if rewriter.replace(node, b("Add", *node.inputs), "again") and number == FAULT:
                raise ValueError("the third is too much")


@dataclass(frozen=True, slots=True)
class BreaksFacts(Pass):
    """Drop a state from the facts: wrong before any rewrite."""

    name: ClassVar[str] = "breaks-facts"

    def run(self, module: Module, rewriter: Rewriter) -> None:
        del module.residents[0]


@dataclass(frozen=True, slots=True)
class LeavesOne(Pass):
    """Replace additions by themselves, all but the last, although every one must be."""

    name: ClassVar[str] = "leaves-one"
    expect: ClassVar[Expect] = AllSites()

    def run(self, module: Module, rewriter: Rewriter) -> None:
        for node in self.sites(module)[:-1]:
            b = rewriter.at(node)
            rewriter.replace(node, b("Sum", *node.inputs), "sum")

    def sites(self, module: Module) -> list[ir.Node]:
        return residuals(module)


def register_all(patch: pytest.MonkeyPatch) -> None:
    """Make the passes known until the patch is undone."""
    for cls in (FlippedSign, Raises, BreaksFacts, LeavesOne):
        patch.setitem(base._REGISTRY, cls.name, cls)
