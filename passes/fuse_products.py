"""Join products that read the same value: queries, keys and values, gate and up projection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.ir.sources import sources_of
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect
from qeff_ir.passing.weights import Stored, side_by_side, stored
from qeff_ir.quantized import quantized
from qeff_ir.ranges import file_range


@register
@dataclass(frozen=True, slots=True)
class FuseProducts(Pass):
    """``MatMul(x, A)`` and ``MatMul(x, B)`` become ``Split(MatMul(x, [A B]))`` where both are in one module.

    A runtime then divides one large product among its threads, where it divided several small ones. A weight that
    another product reads too stays alone, as does one that is stored the other way round than the others, or in blocks
    of another kind.

    The weights stay references into the checkpoint by default, and a `Concat` puts them side by side: a runtime that
    folds constants does so once, when it opens the package, and takes the memory of both for that time. With
    ``weights=written`` they are one weight, which the package has in a file of its own. Quantized weights always are,
    for no kernel takes codes that a `Concat` makes.

    It stands where adapters and copies of heads have found their layers, and before the target's own kernels replace
    products; where it is not stock, before `kv-retention` (``+fuse-products<kv-retention``).
    """

    name: ClassVar[str] = "fuse-products"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_weights: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    expect: ClassVar[Expect] = AllSites()

    weights: Literal["referenced", "written"] = field(
        default="referenced", metadata={"help": "whether joined weights stay in the checkpoint's files"}
    )

    def sites(self, module: Module) -> list[ir.Node]:
        """The first product of each group."""
        return [group[0] for group in _groups(module, self.weights == "written")]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Fuse each group."""
        for group in _groups(module, self.weights == "written"):
            if rewriter.rewrite(f"{len(group)} products"):
                self._fuse(group, rewriter)
        rewriter.sweep()

    def _fuse(self, group: list[ir.Node], rewriter: Rewriter) -> None:
        x, b = group[0].inputs[0], rewriter.at(*group)
        parts = [part for node in group if (part := stored(node)) is not None]
        written = self.weights == "written" or all(quantized(part.value.const_value) is not None for part in parts)
        both = _written(group, parts, rewriter) if written else _referenced(parts, b)
        weight = b("Transpose", both, perm=[1, 0]) if parts[0].transposed else both
        sizes = b.const([part.features[1] for part in parts])
        split = b.several("Split", b("MatMul", x, weight), sizes, axis=-1, shapes=[None] * len(parts))
        for node, value in zip(group, split, strict=True):
            rewriter.substitute(node, value)


def _groups(module: Module, written: bool) -> list[list[ir.Node]]:
    """Products of the same value below the same module, with weights of their own that are stored the same way.

    `written`: codes too that a checkpoint has in this form.
    """
    found: dict[tuple[ir.Value | None, str, bool, object], list[ir.Node]] = {}
    for node in module.graph:
        weight = stored(node)
        if weight is None or len(list(_products(weight))) > 1 or not (written or _is_written(weight)):
            continue
        found.setdefault((node.inputs[0], _parent(node), weight.transposed, _grid(weight)), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _grid(weight: Stored) -> object:
    """What quantized weights have to share, so that their codes can stand side by side; `None` for others."""
    parts = quantized(weight.value.const_value)
    if parts is None:
        return None
    alone = weight.value if parts.axis == weight.out_axis else None
    return parts.codes.dtype, parts.axis, parts.block, parts.zeros is None, alone


def _is_written(weight: Stored) -> bool:
    """Whether joining a weight makes no copy of bytes that a package would only refer to."""
    parts = quantized(weight.value.const_value)
    return parts is None or file_range(parts.codes) is None


def _products(weight: Stored) -> Iterable[ir.Node]:
    for user in weight.value.consumers():
        yield from user.outputs[0].consumers() if user.op_type == "Transpose" else [user]


def _parent(node: ir.Node) -> str:
    return next(iter(sources_of(node)), "").rpartition(".")[0]


def _referenced(parts: list[Stored], b: OpBuilder) -> ir.Value:
    return b("Concat", *(part.value for part in parts), axis=parts[0].out_axis)


def _written(group: list[ir.Node], parts: list[Stored], rewriter: Rewriter) -> ir.Value:
    own = [source.rpartition(".")[2] for node in group for source in sources_of(node)]
    return side_by_side(rewriter, f"{_parent(group[0])}.{'_and_'.join(own)}.weight", parts).value
