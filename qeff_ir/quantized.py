"""Weights of few bits: codes, and a scale for each block of them.

In memory, a module has a float32 tensor alone, marked with what its numbers are made of (`dequantized`): passes that
know nothing of bits see a weight like any other. A pass of a target takes the codes where it has a kernel for them
(`quantized`). What is left has a `DequantizeLinear` in the ONNX file (`spell`), which is one weight again when the file
is read (`fold`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError
from qeff_ir.widening import in_order, put_back, put_first

CODES = frozenset(
    {
        ir.DataType.UINT4,
        ir.DataType.INT4,
        ir.DataType.UINT8,
        ir.DataType.INT8,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT4E2M1,
    }
)
"""Element types of codes."""
SCALES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E8M0})
"""Element types of scales."""

_META_KEY = "qeff.quantized"
_KEY = "qeff.dequantized"
"""In the metadata of a `DequantizeLinear` that `spell` has made."""
_OPSET = 21
"""Of ONNX, the first whose `DequantizeLinear` has blocks."""
_SCALES, _ZEROS, _WIDE = ".scales", ".zeros", ".float32"
"""Endings of the names of a weight's parts, and of what is made of them; the codes have the weight's own name."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """The parts of a quantized weight, as ``DequantizeLinear`` takes them.

    A number is ``(code - zero) * scale``, in float32. Blocks lie along one axis; the last block may be shorter.

    Attributes:
        codes: One of `CODES`, of the weight's shape.
        scales: One of `SCALES`; of the weight's shape, but for the axis of the blocks, where it has one for each.
        zeros: The code of zero in each block, like the scales in shape and like the codes in type; `None`: 0.
        axis: Of the blocks, not negative.
        block: Numbers that share a scale.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zeros: ir.TensorProtocol | None
    axis: int
    block: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(int(d) for d in self.codes.shape.numpy())

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def problem(self) -> str | None:
        """What does not fit together, as the end of a sentence that begins with the weight."""
        shape = self.shape
        if self.codes.dtype not in CODES or self.scales.dtype not in SCALES:
            return f"has codes of {self.codes.dtype} and scales of {self.scales.dtype}"
        if not 0 <= self.axis < len(shape) or self.block < 1:
            return f"has {len(shape)} axes, and blocks of {self.block} along axis {self.axis}"
        blocks = list(shape)
        blocks[self.axis] = -(-shape[self.axis] // self.block)
        if list(self.scales.shape.numpy()) != blocks:
            return f"has scales {list(self.scales.shape.numpy())}: blocks of {self.block} need {blocks}"
        if self.zeros is None:
            return None
        if list(self.zeros.shape.numpy()) != blocks or self.zeros.dtype != self.codes.dtype:
            found = f"{self.zeros.dtype} {list(self.zeros.shape.numpy())}"
            return f"has zeros of {found}: the codes need {self.codes.dtype} {blocks}"
        return None

    def numbers(self, rows: Any = slice(None)) -> Array:
        """The weight, float32.

        Args:
            rows: Which of the first axis; all when not given. Of blocks along that axis, all have to be asked for.
        """
        made = _values(self.codes.dtype).take(self.codes.numpy()[rows].view(np.uint8))
        if self.zeros is not None:
            self._with_blocks(np.subtract, made, self.zeros.numpy()[rows])
        self._with_blocks(np.multiply, made, self.scales.numpy()[rows])
        return made

    def _with_blocks(self, operation: np.ufunc, made: Array, blocks: Array) -> None:
        """Apply an operation to each number and what its block has, in place."""
        before, after = made.shape[: self.axis], made.shape[self.axis + 1 :]
        count = made.shape[self.axis] // self.block
        at = (slice(None),) * self.axis
        wide = blocks.astype(np.float32)
        whole = made[(*at, slice(count * self.block))].reshape(*before, count, self.block, *after)  # a view
        operation(whole, np.expand_dims(wide[(*at, slice(count))], self.axis + 1), out=whole)
        rest = made[(*at, slice(count * self.block, None))]
        if rest.size:
            operation(rest, wide[(*at, slice(count, None))], out=rest)


@functools.cache
def _values(dtype: ir.DataType) -> Array:
    """The number of each byte, as an array has it that holds codes of a type."""
    return np.arange(256, dtype=np.uint8).view(dtype.numpy()).astype(np.float32)


def dequantized(name: str, parts: Quantized) -> ir.LazyTensor:
    """The weight that the parts make: float32, computed when somebody asks for its numbers."""

    def read() -> ir.TensorProtocol:
        return ir.Tensor(parts.numbers(), name=name)

    tensor = ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(parts.shape), name=name)
    tensor.meta[_META_KEY] = parts
    return tensor


def quantized(tensor: ir.TensorProtocol | None) -> Quantized | None:
    """The parts of a weight that `dequantized` has made, or `None` for any other tensor."""
    return tensor.meta.get(_META_KEY) if isinstance(tensor, ir.LazyTensor) else None


def lazy(
    name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Array], *, packed: bool = False
) -> ir.LazyTensor:
    """A part of a weight that is made when somebody asks for it.

    Args:
        name: Of the tensor.
        dtype: Its element type.
        shape: Its sizes.
        make: Gives the numbers: of the element type, or unsigned bytes of the same bits (one for each number of 4 bits,
            too).
        packed: Whether `make` gives the bytes of a file instead, two numbers of 4 bits in each, the first in its low
            half.
    """

    def read() -> ir.TensorProtocol:
        array = np.ascontiguousarray(make())
        if packed and dtype.bitwidth < 8:
            return ir.PackedTensor(array.reshape(-1), dtype, shape=shape, name=name)
        return ir.Tensor(array.view(dtype.numpy()).reshape(shape), dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype, ir.Shape(shape), name=name)


def spell(model: ir.Model) -> None:
    """Give the quantized initializers of the main graph a `DequantizeLinear`, in place.

    Raises:
        PackageError: The model's opset has none with blocks.
    """
    graph, nodes = model.graph, list[ir.Node]()
    with in_order(graph):
        for name, value in list(graph.initializers.items()):
            parts, known_outside = quantized(value.const_value), value.is_graph_input() or value.is_graph_output()
            if parts is None or known_outside:
                continue
            if model.opset_imports.get("", 0) < _OPSET:
                raise PackageError(
                    f"the weight {name} has blocks, which opset {model.opset_imports.get('')} does not know: put the "
                    "pass dequantize into the pipeline"
                )
            del graph.initializers[name]
            value.const_value, value.name = None, name + _WIDE
            inputs = [_part(graph, name, parts.codes, value.metadata_props)]
            inputs.append(_part(graph, name + _SCALES, single(parts.scales), value.metadata_props))
            if parts.zeros is not None:
                inputs.append(_part(graph, name + _ZEROS, parts.zeros, value.metadata_props))
            value.metadata_props.clear()
            attributes = {"axis": parts.axis, "block_size": parts.block}
            node = ir.node("DequantizeLinear", inputs, attributes, outputs=[value])
            node.metadata_props[_KEY] = ""
            nodes.append(node)
    put_first(graph, nodes)


def fold(model: ir.Model) -> None:
    """Undo `spell`, in place. A node that only says so stays as it is."""
    graph = model.graph
    with in_order(graph):
        for node in list(graph):
            parts = _spelled(node)
            if parts is not None and node.inputs[0] is not None:
                put_back(node, dequantized(str(node.inputs[0].name), parts))


def forget(model: ir.Model) -> list[ir.Value]:
    """Let the quantized initializers of the main graph be float32 and nothing else, in place; returns them."""
    found: list[ir.Value] = []
    for value in model.graph.initializers.values():
        parts = quantized(value.const_value)
        if parts is not None:
            value.const_value = plain(str(value.name), parts)
            found.append(value)
    return found


def plain(name: str, parts: Quantized) -> ir.LazyTensor:
    """The weight as a float32 tensor that nobody can tell from others."""
    return lazy(name, ir.DataType.FLOAT, parts.shape, parts.numbers)


def single(scales: ir.TensorProtocol) -> ir.TensorProtocol:
    """Scales as float32: what a `DequantizeLinear` gives has their type."""
    if scales.dtype == ir.DataType.FLOAT:
        return scales
    shape = tuple(int(d) for d in scales.shape.numpy())
    return lazy(scales.name or "", ir.DataType.FLOAT, shape, lambda: scales.numpy().astype(np.float32))


def _part(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, metadata: dict[str, str]) -> ir.Value:
    value = ir.val(name, tensor.dtype, ir.Shape(tensor.shape.numpy()), const_value=tensor)
    value.metadata_props.update(metadata)
    graph.initializers[name] = value
    return value


def _spelled(node: ir.Node) -> Quantized | None:
    """The weight that a node makes of its parts."""
    if _KEY not in node.metadata_props or node.op_type != "DequantizeLinear" or node.domain:
        return None
    if len(node.inputs) not in (2, 3):
        return None
    for value in node.inputs:
        if value is None or not value.is_initializer() or value.const_value is None:
            return None
        if len(value.uses()) != 1 or not value.name or value.is_graph_output():
            return None
    codes, scales, *zeros = [value.const_value for value in node.inputs if value is not None]
    assert codes is not None and scales is not None
    parts = Quantized(
        codes,
        scales,
        zeros[0] if zeros else None,
        node.attributes.get_int("axis", 1),
        node.attributes.get_int("block_size", 0),
    )
    return parts if parts.problem() is None else None
