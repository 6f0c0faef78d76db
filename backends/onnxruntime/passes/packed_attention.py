"""Let ONNX Runtime's attention kernel read queries, keys and values where one product has put them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import made_by

from ._rows import size
from .kernels import ORT_DOMAIN


@register
@dataclass(frozen=True, slots=True)
class OrtPackedAttention(Pass):
    """A `GroupQueryAttention` of the three parts of one `Split` takes the whole, ``[batch, seq, (heads + 2 kv_heads) *
    width]``.

    `fuse-products` makes the split; the kernel then saves a copy of queries, keys and values in each layer. Where
    something else reads a part, or a norm stands between, the split stays.
    """

    name: ClassVar[str] = "ort-packed-attention"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered", "attention-lowered"})
    idempotent: ClassVar[bool] = True

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Take the whole where it can be."""
        for node in self.sites(module):
            problem = _problem(node)
            if problem is not None:
                rewriter.missed(node, problem)
            elif rewriter.rewrite("GroupQueryAttention"):
                split = node.inputs[0].producer() if node.inputs[0] is not None else None
                assert split is not None
                node.replace_input_with(0, split.inputs[0])
                node.replace_input_with(1, None)
                node.replace_input_with(2, None)
        rewriter.sweep()

    def sites(self, module: Module) -> list[ir.Node]:
        """Kernels whose queries are a part of a `Split`."""
        kernels = [n for n in module.graph if (n.domain, n.op_type) == (ORT_DOMAIN, "GroupQueryAttention")]
        return [node for node in kernels if made_by(node.inputs[0], "Split") is not None]


def _problem(node: ir.Node) -> str | None:
    """Why a kernel cannot take the whole, or `None` when it can."""
    split = made_by(node.inputs[0], "Split")
    assert split is not None
    if list(node.inputs[:3]) != list(split.outputs):
        return "queries, keys and values are not the three parts in this order"
    if any(len(list(part.uses())) != 1 or part.is_graph_output() for part in split.outputs):
        return "something else reads a part"
    axis = split.attributes.get_int("axis", 0)
    if axis not in (-1, 2):
        return "the parts do not lie along the features"
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    widths = [size(part, 2) for part in split.outputs]
    past = size(node.inputs[3], 3)
    if past is None or widths != [heads * past, kv_heads * past, kv_heads * past]:
        return "a part has another width than its heads"
    return None
