"""Round weights to few bits, a scale and a zero for each block of input features."""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from passes.nbits_layout import products_of, readers_of
from qeff_ir.arrays import Array
from qeff_ir.errors import PassError
from qeff_ir.ir.module import CHANGED_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.ports import LOGITS
from qeff_ir.numerics import Approximates, Numeric
from qeff_ir.passing.base import Missed, Pass, Phase, Rewriter, register
from qeff_ir.passing.properties import FAST
from qeff_ir.passing.weights import stored
from qeff_ir.quantized import Quantized, dequantized, lazy, quantized

_CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_SHRUNK = (1.0, 0.94, 0.88, 0.82, 0.76)
"""Parts of a block's range that are tried: what lies outside is clipped, and the rest is rounded more finely."""
Bits = Literal[0, 4, 8]


@register
@dataclass(frozen=True, slots=True)
class QuantizeWeights(Pass):
    """Round weights of linear layers and experts to the nearest of ``2 ** bits`` numbers, of each block the best range.

    Blocks lie along the input features; where these are no multiple of ``block``, halves of it are tried down to 16,
    and the last block of a row is shorter if none fits. The range of a block is the one of `_SHRUNK` with the least
    squared error. Numbers are read and rounded when the weights are written, one weight after the other. What is
    quantized already stays as it is. Experts that are stacked, ``[experts, rows, columns]``, have blocks along the last
    axis.

    The answers are those of other weights: `qeff verify` measures how far they drift.

    The head is the layer that makes the logits. A table of tokens that the head shares is rounded with it. 0 bits leave
    a weight alone.
    """

    name: ClassVar[str] = "quantize-weights"
    phase: ClassVar[Phase] = Phase.ADAPT
    changes_weights: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    establishes: ClassVar[frozenset[str]] = frozenset({FAST})
    numeric: ClassVar[Numeric] = Approximates("weights are rounded to few bits", 10.0)

    bits: Literal[4, 8] = field(default=4, metadata={"help": "bits of a number"})
    block: int = field(default=128, metadata={"help": "numbers that share a scale: 16, 32, 64, 128 or 256"})
    symmetric: bool = field(default=False, metadata={"help": "whether zero is the middle code of every block"})
    head: Bits | None = field(default=None, metadata={"help": "bits of the LM head; as the others by default"})
    table: Bits = field(default=0, metadata={"help": "bits of tables of embeddings that no head shares"})
    skip: str = field(default="", metadata={"help": "weights that are left alone: names with *, comma-separated"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Mark the weights.

        Raises:
            PassError: The size of the blocks is none that kernels take; or `skip` names no weight.
        """
        if self.block not in (16, 32, 64, 128, 256):
            raise PassError(f"blocks of {self.block} are none that kernels take: use 16, 32, 64, 128 or 256")
        patterns, head = [p.strip() for p in self.skip.split(",") if p.strip()], _head(module)
        names = [v.metadata_props.get(WEIGHT_KEY, "") for v in module.graph.initializers.values()]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise PassError(f"skip names '{pattern}', which is no weight of the model: {names[0]} is one")
        for name, value in module.graph.initializers.items():
            tensor, axis = value.const_value, _inputs(value)
            own = value.metadata_props.get(WEIGHT_KEY, "")
            if axis is None or tensor is None or quantized(tensor) is not None or tensor.dtype != ir.DataType.FLOAT:
                continue
            bits = self._bits(value, value is head)
            if any(fnmatch.fnmatch(own, pattern) for pattern in patterns) or not bits:
                continue
            if not rewriter.rewrite(f"{bits} bits"):
                return
            value.const_value = dequantized(name, self._parts(name, tensor, bits, axis))
            value.metadata_props[CHANGED_KEY] = rewriter.pass_id

    def sites(self, module: Module) -> list[ir.Node]:
        """Products whose weight is not quantized."""
        weights = [(node, stored(node)) for node in module.graph]
        return [n for n, weight in weights if weight is not None and quantized(weight.value.const_value) is None]

    def explain(self, module: Module, site: ir.Node) -> Missed:
        """The options say so, or another reader does."""
        weight = stored(site)
        what = "its weight" if weight is None else str(weight.value.name)
        return Missed.at(site, f"{what} stays float32: the options leave it out, or something else reads it too")

    def _bits(self, value: ir.Value, is_head: bool) -> int:
        if is_head and self.head is not None:
            return self.head
        return self.bits if is_head or products_of(value) or _is_stacked(value) else self.table

    def _parts(self, name: str, tensor: ir.TensorProtocol, bits: int, axis: int) -> Quantized:
        shape = tuple(int(d) for d in tensor.shape.numpy())
        block = self.block
        while block > 16 and shape[axis] % block:
            block //= 2
        if shape[axis] % block:
            block = self.block
        job = _Rounding(tensor, bits, block, axis, self.symmetric)
        dtype, blocks = _CODES[bits], list(shape)
        blocks[axis] = -(-shape[axis] // block)
        return Quantized(
            lazy(name, dtype, shape, lambda: _rounded(job)[0]),
            lazy(name, ir.DataType.FLOAT, tuple(blocks), lambda: _rounded(job)[1]),
            lazy(name, dtype, tuple(blocks), lambda: _rounded(job)[2]),
            axis,
            block,
        )


def _inputs(value: ir.Value) -> int | None:
    """The axis of the blocks of a weight that can be quantized: of products, a table of rows, or stacked experts.

    Kernels that look experts up take blocks along the last axis, which is that of the input features but in few models.
    """
    if WEIGHT_KEY not in value.metadata_props or value.shape is None:
        return None
    if _is_stacked(value):
        return 2
    if len(value.shape) != 2:
        return None
    products, readers = products_of(value), readers_of(value)
    axes = {1 - found.out_axis for node in products if (found := stored(node)) is not None}
    rows = [node for node in readers if node not in products]
    if any(n.op_type != "Gather" or n.inputs[0] is not value or n.attributes.get_int("axis", 0) for n in rows):
        return None
    axes |= {1} if rows else set()
    return axes.pop() if len(axes) == 1 else None


def _is_stacked(value: ir.Value) -> bool:
    """Whether a weight has three axes, and is looked up along the first and by nothing else: experts of one layer."""
    readers = list(value.consumers())
    return value.shape is not None and len(value.shape) == 3 and bool(readers) and all(map(_looks_up, readers))


def _looks_up(node: ir.Node) -> bool:
    index = node.inputs[1] if len(node.inputs) > 1 else None
    if node.domain or index is None or index.shape is None:
        return False
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) == 0
    single = node.op_type == "GatherND" and node.attributes.get_int("batch_dims", 0) == 0
    return single and len(index.shape) > 0 and index.shape[-1] == 1


def _head(module: Module) -> ir.Value | None:
    """The weight of the product that makes the logits."""
    value = module.port(LOGITS) if any(module.role_of(v) is LOGITS for v in module.graph.outputs) else None
    while value is not None and (node := value.producer()) is not None:
        found = stored(node)
        if found is not None:
            return found.value
        value = next((v for v in node.inputs if v is not None and not v.is_initializer()), None)
    return None


@dataclass(frozen=True, eq=False)
class _Rounding:
    """What `_rounded` is asked for."""

    tensor: ir.TensorProtocol
    bits: int
    block: int
    axis: int
    symmetric: bool


@functools.lru_cache(maxsize=1)
def _rounded(job: _Rounding) -> tuple[Array, Array, Array]:
    """Codes, scales and zeros of a weight; those of the last one are kept, for all three are asked for."""
    turned = np.moveaxis(job.tensor.numpy(), job.axis, -1).astype(np.float32, copy=False)
    size, top = turned.shape[-1], (1 << job.bits) - 1
    rows = turned.reshape(-1, size)
    blocks = -(-size // job.block)
    found = [
        _round(_blocks(rows[at : at + _ROWS], blocks * job.block, job.block), top, job.symmetric)
        for at in range(0, len(rows), _ROWS)
    ]
    codes, scales, zeros = (np.concatenate(parts) for parts in zip(*found, strict=True))
    codes = codes.reshape(len(rows), -1)[:, :size]
    whole = [part.reshape(*turned.shape[:-1], -1) for part in (codes, scales, zeros)]
    back = [np.ascontiguousarray(np.moveaxis(part, -1, job.axis)) for part in whole]
    return back[0], back[1], back[2]


_ROWS = 1024
"""Rows that are rounded at once: what is computed on the way takes several times their memory."""


def _blocks(rows: Array, width: int, block: int) -> Array:
    """``[rows, blocks, block]``; the end of a row is padded with zeros, which have a code in every range."""
    padded = np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) if width > rows.shape[1] else rows
    return padded.reshape(len(rows), -1, block)


def _round(blocks: Array, top: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes ``[rows, blocks, block]``, scales and zeros ``[rows, blocks]``, of the range with the least error."""
    if symmetric:
        at = np.abs(blocks).argmax(-1)[..., None]
        low = np.take_along_axis(blocks, at, -1)[..., 0]  # its code is 0, whatever its sign is: the scale has it
        low, high = low, -low * np.float32((top - 1) / (top + 1))
    else:
        low, high = np.minimum(blocks.min(-1), 0.0), np.maximum(blocks.max(-1), 0.0)
    best: list[Array] | None = None
    for part in _SHRUNK:
        scales = ((high - low) * np.float32(part / top)).astype(np.float32)
        scales = np.where(scales == 0, np.float32(1), scales)
        zeros = np.full_like(scales, (top + 1) // 2) if symmetric else np.rint(-low * np.float32(part) / scales)
        zeros = np.clip(zeros, 0, top)
        codes = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, top)
        error = np.square((codes - zeros[..., None]) * scales[..., None] - blocks).sum(-1)
        if best is None:
            best = [codes, scales, zeros, error]
            continue
        better = error < best[3]
        for kept, new in zip(best, (codes, scales, zeros, error), strict=True):
            kept[better] = new[better]
    assert best is not None
    return best[0].astype(np.uint8), best[1], best[2].astype(np.uint8)
