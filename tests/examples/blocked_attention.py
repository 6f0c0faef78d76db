"""A pass that lowers attention in another way: a softmax that goes over the keys block by block (online softmax).

M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.passing import AnyNumber, Expect, Pass, Phase, Rewriter
from qeff_ir.passing.matching import operand
from qeff_ir.passing.scores import Scores, does_more


@dataclass(frozen=True, slots=True)
class BlockedAttention(Pass):
    """Attention over blocks of keys, none longer than ``block``: no score of all keys is ever in memory.

    The keys are split into as many blocks as the longest of the specializations needs; in others the blocks are
    shorter. Stands behind ``kv-retention``, which tells the lengths, and before ``attention``, which takes the others.
    """

    name: ClassVar[str] = "blocked-attention"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "states-lowered"})
    expect: ClassVar[Expect] = AnyNumber()

    block: int = dataclasses.field(default=1024, metadata={"help": "keys of a block, at most"})

    def sites(self, module: Module) -> list[ir.Node]:
        """Attention of any kind."""
        return [node for node in module.graph if node.op_type in ("Attention", "SinkAttention") and not does_more(node)]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Lower each attention over more keys than a block has."""
        for node in self.sites(module):
            lengths = _lengths(module, node.inputs[1])
            if not lengths:
                rewriter.missed(node, "no specialization bounds the number of keys")
            elif max(lengths) <= self.block:
                rewriter.missed(node, "all keys are in one block")
            elif (count := blocks(lengths, self.block)) is None:
                rewriter.missed(node, "a specialization has less keys than blocks")
            elif (mask := operand(node, 3)) is not None and mask.shape is None:
                rewriter.missed(node, "the shape of the mask is not known")
            elif rewriter.rewrite(f"{count} blocks"):
                rewriter.substitute(node, _blocked(Scores.of(node, rewriter.at(node)), lengths, count))
        rewriter.sweep()
        operators.attach(module.model)


def _lengths(module: Module, keys: ir.Value | None) -> set[int]:
    """The numbers of keys that specializations give an attention; none where one is not known."""
    assert keys is not None
    dim = keys.shape[2] if keys.shape is not None else None
    if isinstance(dim, int):
        return {dim}
    found = {s.symbols.get(str(dim), 0) for s in module.specializations}
    return set() if 0 in found else found


def blocks(lengths: set[int], block: int) -> int | None:
    """The least number of blocks of at most `block` keys; `None` where one would be empty."""
    count = -(-max(lengths) // block)
    return count if count <= min(lengths) else None


def bounds(length: int, count: int) -> list[int]:
    """Where the blocks begin, and where the last ends: their sizes differ by one at most."""
    return [index * length // count for index in range(count + 1)]


def _blocked(parts: Scores, lengths: set[int], count: int) -> ir.Value:
    b, mask, queries, ends = parts.b, parts.mask, parts.queries(), _ends(parts, lengths, count)
    keys, values = _split(parts, parts.keys, 2, ends), _split(parts, parts.values, 2, ends)
    masks: list[ir.Value | None] = [mask] * count
    if mask is not None and mask.shape is not None and mask.shape[-1] != 1:
        masks = [*_split(parts, mask, len(mask.shape) - 1, ends)]
    top = total = mixed = None
    for key, value, hidden in zip(keys, values, masks, strict=True):
        scores = parts.of_keys(queries, key, hidden)
        highest = b("ReduceMax", scores, b.const([-1]), keepdims=1)
        new = highest if top is None else b("Max", top, highest)
        weights = b("Exp", b("Sub", scores, new))
        of_block, sums = parts.mixed(weights, value), b("ReduceSum", weights, b.const([-1]), keepdims=1)
        if top is not None:
            fade = b("Exp", b("Sub", top, new))
            of_block, sums = b("Add", b("Mul", mixed, fade), of_block), b("Add", b("Mul", total, fade), sums)
        top, total, mixed = new, sums, of_block
    assert mixed is not None and total is not None
    sinks = parts.sinks()
    if sinks is not None:  # one more logit, which takes weight and gives nothing
        new = b("Max", top, sinks)
        fade = b("Exp", b("Sub", top, new))
        total = b("Add", b("Mul", total, fade), b("Exp", b("Sub", sinks, new)))
        mixed = b("Mul", mixed, fade)
    return parts.joined(b("Div", mixed, total))


def _ends(parts: Scores, lengths: set[int], count: int) -> list[ir.Value]:
    """`bounds`, each ``[1]``: constants where all specializations agree, else computed of the number of keys."""
    b = parts.b
    if len(lengths) == 1:
        return [b.const([at]) for at in bounds(min(lengths), count)]
    length = b("Shape", parts.keys, start=2, end=3)
    return [b("Div", b("Mul", length, b.const([index])), b.const([count])) for index in range(count + 1)]


def _split(parts: Scores, value: ir.Value, axis: int, ends: list[ir.Value]) -> list[ir.Value]:
    """The blocks of a value along an axis."""
    b, dims = parts.b, [None if i == axis else d for i, d in enumerate(value.shape.dims if value.shape else ())]
    return [
        b("Slice", value, *side, b.const([axis]), shape=ir.Shape(dims), dtype=value.dtype)
        for side in itertools.pairwise(ends)
    ]
