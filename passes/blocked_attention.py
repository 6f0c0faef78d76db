"""Cut attention into blocks of heads, of queries and of keys, none larger than a device's fast memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AnyNumber, Expect
from qeff_ir.passing.matching import operand
from qeff_ir.passing.scores import Scores, does_more

from ._blocks import Counts, Extent, blocks, fitting, sizes
from ._online_softmax import attend


@register
@dataclass(frozen=True, slots=True)
class BlockedAttention(Pass):
    """Attention over blocks of heads (``h``), of queries (``q``) and of keys (``kv``), as ``mode`` names them.

    Each block of heads and queries is an attention of its own; over blocks of keys, the softmax goes block by block.
    Scale, soft-cap, windows, rings, masks of any kind, sinks and narrow values are all kept.

    Numbers that are 0 are chosen: the least by which scores, keys and values of a block take 6 MiB in half precision
    (AI 100 contract §3). No axis has more blocks than the shortest specialization has entries: where a package decodes,
    its one query cannot be cut, and queries stay whole unless it only has prefill.

    It stands behind ``kv-retention``, which tells the lengths, and before ``attention``, which lowers what is in one
    block of keys (``+blocked-attention<attention``).
    """

    name: ClassVar[str] = "blocked-attention"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "states-lowered"})
    expect: ClassVar[Expect] = AnyNumber()

    mode: Literal["kv", "q", "h", "qkv", "hq", "hkv", "hqkv"] = field(
        default="hqkv", metadata={"help": "what is cut: heads, queries, keys"}
    )
    num_kv_blocks: int = field(default=0, metadata={"help": "blocks of keys; 0 chooses"})
    num_q_blocks: int = field(default=0, metadata={"help": "blocks of queries; 0 chooses"})
    head_block_size: int = field(default=0, metadata={"help": "query heads of a block, in whole groups; 0 chooses"})

    def sites(self, module: Module) -> list[ir.Node]:
        """Attention of any kind."""
        return [node for node in module.graph if node.op_type in ("Attention", "SinkAttention") and not does_more(node)]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Cut each attention that is larger than a block.

        Raises:
            PassError: A number is negative, or is one of what ``mode`` does not cut; or attention is lowered already.
        """
        self._check(module)
        for node in self.sites(module):
            found = self._counts(module, node)
            if isinstance(found, str):
                rewriter.missed(node, found)
                continue
            counts, extent = found
            if min(extent.queries) < self.num_q_blocks:
                few = f"a specialization has {min(extent.queries)} queries, less than num_q_blocks={self.num_q_blocks}"
                rewriter.missed(node, few)
            if counts == (1, 1, 1):
                rewriter.missed(node, "all of it is in one block")
            elif rewriter.rewrite(f"{counts[0]} x {counts[1]} x {counts[2]} blocks"):
                rewriter.substitute(node, _blocked(node, rewriter, counts, extent))
        rewriter.sweep()
        operators.attach(module.model)

    def _check(self, module: Module) -> None:
        given = {"num_kv_blocks": "kv", "num_q_blocks": "q", "head_block_size": "h"}
        for name, letter in given.items():
            number, cuts = getattr(self, name), letter in self._cuts()
            if number < 0 or (number and not cuts):
                raise PassError(f"{name}={number} does not fit mode={self.mode}: give 0 or more of what the mode names")
        if "attention-lowered" in module.properties:
            raise PassError("attention is lowered already: write +blocked-attention<attention")

    def _cuts(self) -> set[str]:
        return {*self.mode.removesuffix("kv"), *(["kv"] if self.mode.endswith("kv") else [])}

    def _counts(self, module: Module, node: ir.Node) -> tuple[Counts, Extent] | str:
        """Blocks of each axis, or why there are none."""
        shapes = [value.shape if value is not None else None for value in node.inputs[:3]]
        mask = operand(node, 3)
        if any(shape is None or len(shape) != 4 for shape in shapes) or (mask is not None and mask.shape is None):
            return "a shape is not known"
        q, k, v = (shape for shape in shapes if shape is not None)
        batch, queries, keys = sizes(module, q[0]), sizes(module, q[2]), sizes(module, k[2])
        heads, kv_heads, widths = q[1], k[1], (k[3], v[3])
        if not batch or not queries or not keys:
            return "no specialization bounds the number of queries or keys"
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or not all(isinstance(w, int) for w in widths):
            return "the number or the width of the heads is not known"
        group = heads // kv_heads
        extent = Extent(max(batch), kv_heads, group, queries, keys, sum(w for w in widths if isinstance(w, int)))
        of_heads = -(-kv_heads // max(1, self.head_block_size // group)) if self.head_block_size else None
        wanted = {"h": of_heads, "q": self.num_q_blocks or None, "kv": self.num_kv_blocks or None}
        return fitting(extent, [wanted[axis] if axis in self._cuts() else 1 for axis in wanted]), extent


def _blocked(node: ir.Node, rewriter: Rewriter, counts: Counts, extent: Extent) -> ir.Value:
    """The attention of all blocks, put together: ``[batch, heads, seq, value_dim]``."""
    b, (q, k, v), mask, sinks = rewriter.at(node), node.inputs[:3], operand(node, 3), operand(node, 4)
    assert q is not None and k is not None and v is not None
    rank = 4 if mask is None or mask.shape is None else len(mask.shape)
    of_heads, groups = (
        blocks(counts[0], frozenset({extent.kv_heads}), b, k, 1, together) for together in (1, extent.group)
    )
    of_queries, of_keys = blocks(counts[1], extent.queries, b, q, 2), blocks(counts[2], extent.keys, b, k, 2)
    pairs = [(block.of(k, 2, b), block.of(v, 2, b)) for block in of_keys]
    rows: list[ir.Value] = []
    for own, group in zip(of_heads, groups, strict=True):
        keys, values = ([own.of(value, 1, b) for value in column] for column in zip(*pairs, strict=True))
        asking, seen = group.of(q, 1, b), mask and group.of(mask, rank - 3, b)
        sink = sinks and group.of(sinks, 0, b)
        parts: list[ir.Value] = []
        for block in of_queries:
            shown = seen and block.of(seen, rank - 2, b)
            part = _again(node, b, [block.of(asking, 2, b), keys[0], values[0], shown, sink])
            if counts[2] > 1:
                alone = part.producer()
                assert alone is not None
                masks = [shown and keys_of.of(shown, rank - 1, b) for keys_of in of_keys]
                part = attend(Scores.of(alone, b), keys, values, masks)
                rewriter.graph.remove(alone, safe=True)
            parts.append(part)
        rows.append(b("Concat", *parts, axis=2) if len(parts) > 1 else parts[0])
    return b("Concat", *rows, axis=1) if len(rows) > 1 else rows[0]


def _again(node: ir.Node, b: OpBuilder, inputs: list[ir.Value | None]) -> ir.Value:
    """An attention like another one, of other inputs."""
    while inputs[-1] is None:
        inputs.pop()
    q, _, v, *_ = inputs
    assert q is not None and q.shape is not None and v is not None and v.shape is not None
    attributes = {a.name: a.value for a in node.attributes.values()}
    shape = [*q.shape.dims[:3], v.shape[3]]
    return b(node.op_type, *inputs, domain=node.domain, shape=shape, dtype=q.dtype, **attributes)
