"""How kernels for weights of few bits want them: codes as bytes, a scale and a zero for each block of inputs.

`MatMulNBits` and `GatherBlockQuantized` are operators of ONNX Runtime (domain ``com.microsoft``); the compiler of the
AI 100 takes the first one too. A weight ``[out, in]`` has codes ``uint8 [out, blocks, block * bits / 8]``, two of 4
bits in a byte, the first in its low half; scales ``float32 [out, blocks]``; zeros
``uint8 [out, ceil(blocks * bits / 8)]``, packed likewise. The last block is padded. Codes that lie so in a file stay
there.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.weights import added, stored
from qeff_ir.quantized import Quantized, dequantized, lazy, quantized
from qeff_ir.ranges import FileRange, file_range

DOMAIN = "com.microsoft"
BLOCKS = (256, 128, 64, 32, 16)
"""Sizes of blocks that the kernels take; a larger block is several of them with one scale."""
_UNSIGNED = {ir.DataType.UINT4: 0, ir.DataType.INT4: 8, ir.DataType.UINT8: 0, ir.DataType.INT8: 128}
"""Codes that are whole numbers, and what makes each of them unsigned."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight ``[*outer, out, in]`` as initializers.

    Attributes:
        codes: ``uint8 [*outer, out, blocks, block * bits / 8]``.
        scales: ``float32 [*outer, out, blocks]``.
        zeros: ``uint8 [*outer, out, ceil(blocks * bits / 8)]``.
        bits: Of a code.
        block: Numbers of a block.
        features: ``in``.
    """

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value
    bits: int
    block: int
    features: int

    @property
    def outputs(self) -> int:
        """``out``, of a weight of two axes."""
        assert self.codes.shape is not None
        return int(self.codes.shape.numpy()[0])

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.features // self.block)


def block_of(parts: Quantized) -> int | None:
    """The largest block that a kernel takes and that the weight's own blocks consist of."""
    size = parts.shape[parts.axis]
    if parts.block >= size:  # a scale for a whole row, which may be padded
        return next((block for block in BLOCKS if size % block == 0), BLOCKS[-1])
    return next((block for block in BLOCKS if parts.block % block == 0), None)


def misfit(parts: Quantized, axis: int) -> str | None:
    """Why no kernel takes a weight, as one clause; `None` when one does.

    Args:
        parts: The weight.
        axis: Of its input features, not negative.
    """
    if parts.codes.dtype not in _UNSIGNED:
        return f"its codes are {parts.codes.dtype.name}, which no kernel takes"
    if parts.axis != axis:
        return "its blocks do not lie along the input features"
    if block_of(parts) is None:
        return f"its blocks of {parts.block} are no multiple of {BLOCKS[-1]}"
    return None


def products_of(value: ir.Value) -> list[ir.Node]:
    """The matrix products of a weight of two axes that take it as it is, or transposed."""
    readers = [n for node in value.consumers() for n in (_readers(node) if node.op_type == "Transpose" else [node])]
    return [node for node in dict.fromkeys(readers) if (found := stored(node)) is not None and found.value is value]


def readers_of(value: ir.Value) -> list[ir.Node]:
    """What computes with a weight: behind its `Transpose`, where there is one."""
    readers = [n for node in value.consumers() for n in (_readers(node) if node.op_type == "Transpose" else [node])]
    return list(dict.fromkeys(readers))


def readers_of_codes(module: Module) -> dict[ir.Node, ir.Value]:
    """All nodes that compute with a quantized weight, each with the first such weight that it reads."""
    found: dict[ir.Node, ir.Value] = {}
    for value in module.graph.initializers.values():
        if quantized(value.const_value) is not None:
            for node in readers_of(value):
                found.setdefault(node, value)
    return found


def _readers(node: ir.Node) -> list[ir.Node]:
    return list(node.outputs[0].consumers())


def doubled(name: str, parts: Quantized) -> ir.LazyTensor:
    """The same weight with whole codes: twice each number of FLOAT4E2M1 is one, and scales are halved for it."""

    def twice(tensor: ir.TensorProtocol) -> ir.LazyTensor:
        shape = tuple(int(d) for d in tensor.shape.numpy())
        return lazy(name, ir.DataType.INT8, shape, lambda: (tensor.numpy().astype(np.float32) * 2.0).astype(np.int8))

    shape = tuple(int(d) for d in parts.scales.shape.numpy())
    halves = lazy(name, ir.DataType.FLOAT, shape, lambda: parts.scales.numpy().astype(np.float32) * np.float32(0.5))
    zeros = None if parts.zeros is None else twice(parts.zeros)
    return dequantized(name, Quantized(twice(parts.codes), halves, zeros, parts.axis, parts.block))


def pack(rewriter: Rewriter, value: ir.Value, parts: Quantized, *, flat: bool = False) -> Packed:
    """Initializers of the graph that hold a weight as the kernels want it.

    Args:
        rewriter: Of the pass.
        value: The weight.
        parts: What it is made of; they fit (`misfit`), and the axis of the blocks is that of the inputs.
        flat: Whether scales and zeros have one axis.
    """
    block, bits = block_of(parts), parts.codes.dtype.bitwidth
    assert block is not None and bits is not None and value.name
    size = parts.shape[parts.axis]
    blocks, outer = -(-size // block), [d for axis, d in enumerate(parts.shape) if axis != parts.axis]
    times = -(-min(parts.block, size) // block)
    grown = min(parts.block, size) != block  # several of the kernel's blocks share a scale

    def spread(array: Array) -> Array:
        array = np.moveaxis(array, parts.axis, -1)
        return np.repeat(array, times, axis=-1)[..., :blocks] if grown else array

    def scales() -> Array:
        return spread(parts.scales.numpy().astype(np.float32))

    def zeros() -> Array:
        shift = _UNSIGNED[parts.codes.dtype]
        if parts.zeros is None:
            found = np.full([*outer, blocks], shift, np.uint8)
        else:
            found = spread(_unsigned(parts.zeros.numpy(), parts.codes.dtype))
        return _joined(found, bits)

    def made(ending: str, dtype: ir.DataType, width: int, compute: Callable[[], Array]) -> ir.Value:
        shape = (math.prod(outer) * width,) if flat else (*outer, width)
        tensor = lazy(f"{name}.{ending}", dtype, shape, lambda: compute().reshape(shape))
        return added(rewriter, f"{name}.{ending}", tensor, [value])

    name = value.name
    codes = _codes(f"{name}.codes", parts, block, (*outer, blocks, block * bits // 8))
    return Packed(
        added(rewriter, f"{name}.codes", codes, [value]),
        made("scales", ir.DataType.FLOAT, blocks, scales),
        made("zeros", ir.DataType.UINT8, -(-blocks * bits // 8), zeros),
        bits,
        block,
        size,
    )


def _codes(name: str, parts: Quantized, block: int, shape: tuple[int, ...]) -> ir.LazyTensor:
    dtype, size = parts.codes.dtype, parts.shape[parts.axis]
    bits, whole = dtype.bitwidth or 8, size % block == 0 and parts.axis == len(parts.shape) - 1
    where = file_range(parts.codes)
    if whole and where is not None and _UNSIGNED[dtype] == 0:
        return FileRange(where.file, where.offset, where.length, ir.DataType.UINT8, shape, where.linkable).tensor(name)

    def read() -> Array:
        if whole:
            flip = _UNSIGNED[dtype] * (0x11 if bits == 4 else 1)
            return (np.frombuffer(parts.codes.tobytes(), np.uint8) ^ np.uint8(flip)).reshape(shape)
        codes = np.moveaxis(_unsigned(parts.codes.numpy(), dtype), parts.axis, -1)
        padded = np.zeros([*codes.shape[:-1], shape[-2] * block], np.uint8)
        padded[..., :size] = codes
        return _joined(padded, bits).reshape(shape)

    return lazy(name, ir.DataType.UINT8, shape, read)


def _unsigned(codes: Array, dtype: ir.DataType) -> Array:
    return (codes.astype(np.int16) + _UNSIGNED[dtype]).astype(np.uint8)


def _joined(codes: Array, bits: int) -> Array:
    """Two codes of 4 bits in a byte, the first in its low half; the last axis is padded to whole bytes."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
