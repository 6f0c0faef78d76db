"""How a drawn module is written: nodes, constants, weights and products, each in one of its equivalent spellings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.ir import dialect
from qeff_ir.ir.module import LAYER_KEY, SOURCE_KEY, WEIGHT_KEY
from qeff_ir.ir.ports import POSITIONS, TOKENS, name_of
from qeff_ir.testing.recipe import Recipe

FLOAT, INT, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
ROWS = ("batch_size", "seq_len")


class Decomposed:
    """A graph that grows by nodes, and the count of what each pass should find in it.

    Args:
        recipe: What is written, and how it is decomposed.

    Attributes:
        planted: Sites by the name that a pass counts them under.
        missed: Near misses by the name of the pass that must leave them alone.
        source: Module path that new nodes come from.
        ids, positions: Inputs, int64 ``[batch, seq]``.
        graph: All nodes so far.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.r = recipe
        self.random = np.random.default_rng([recipe.spelling, 7])
        self.planted: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.source = "model"
        self.ids = ir.val(name_of(TOKENS), dtype=INT, shape=ir.Shape(ROWS))
        self.positions = ir.val(name_of(POSITIONS), dtype=INT, shape=ir.Shape(ROWS))
        self.graph = ir.Graph([self.ids, self.positions], [], nodes=[], opset_imports={"": dialect.OPSET, "qeff": 1})
        self.names = 0

    def pick(self, count: int) -> int:
        """Which of so many equivalent spellings to use here; the first, where the recipe asks for none."""
        return int(self.random.integers(count)) if self.r.spelling else 0

    def node(
        self, op_type: str, *inputs: ir.Value | None, shape: Any = None, dtype: Any = FLOAT, domain: str = "", **kw: Any
    ) -> ir.Value:
        """Append a node of one result, sometimes with an `Identity` behind it; its result."""
        node = ir.node(op_type, list(inputs), attributes=kw, domain=domain)
        node.metadata_props[SOURCE_KEY] = self.source
        self.names += 1
        out = node.outputs[0]
        out.name = f"{op_type.lower()}_{self.names}"
        out.dtype = dtype
        if shape is not None:
            out.shape = ir.Shape(shape)
        self.graph.append(node)
        if self.pick(8) == 7:
            return self.node("Identity", out, shape=shape, dtype=dtype)
        return out

    def const(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant: an initializer, or a `Constant` node as the exporter makes."""
        array = np.asarray(value, dtype=dtype)
        self.names += 1
        name = f"number_{self.names}"  # not one that onnx_ir gives to values without a name
        if self.pick(2):
            node = ir.node("Constant", [], attributes={"value": ir.tensor(array)})
            node.metadata_props[SOURCE_KEY] = self.source
            node.outputs[0].name = name
            self.graph.append(node)
            return node.outputs[0]
        made = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(made)
        return made

    def number(self, value: float) -> ir.Value:
        """A float32 constant."""
        return self.const(value, np.float32)

    def weight(self, name: str, *shape: int, numbers: Array | None = None, layer: str = "") -> ir.Value:
        """A parameter of the recipe, or with these numbers; the one that is there already under that name."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        array = self.r.tensor(name, *shape) if numbers is None else numbers
        made = ir.val(name, const_value=ir.tensor(array, name=name))
        made.metadata_props[WEIGHT_KEY] = name
        if layer:
            made.metadata_props[LAYER_KEY] = layer
        self.graph.register_initializer(made)
        return made

    def pair(self, op_type: str, one: ir.Value, other: ir.Value, **kw: Any) -> ir.Value:
        """A commutative operator, either way round."""
        return self.node(op_type, *((other, one) if self.pick(2) else (one, other)), **kw)

    def target(self, dims: Sequence[int]) -> ir.Value:
        """Target of a reshape of rows: constant, or computed from the shape of the input as exporters do."""
        if not self.pick(2):
            return self.const([0, 0, *dims])
        parts = [self.node("Shape", self.ids, start=i, end=i + 1, shape=[1], dtype=INT) for i in (0, 1)]
        return self.node("Concat", *parts, self.const(list(dims)), axis=0, shape=[2 + len(dims)], dtype=INT)

    def stored(self, name: str, rows: int, columns: int) -> ir.Value:
        """The weight of a product: stored the other way round as torch does, or as it is."""
        numbers = self.r.product(name, rows, columns)
        if self.pick(3) == 2:
            return self.weight(f"{name}.weight", numbers=numbers, layer="linear")
        self.planted["FusedMatMul"] += 1
        turned = self.weight(f"{name}.weight", numbers=np.ascontiguousarray(numbers.T), layer="linear")
        return self.node("Transpose", turned, perm=[1, 0], shape=[rows, columns])

    def linear(self, name: str, x: ir.Value, columns: int, *, odd: bool = False) -> ir.Value:
        """A linear layer of the module `name`, ``[batch, seq, rows]`` to ``[batch, seq, columns]``."""
        around, self.source = self.source, f"model.{name}"
        out = self.product(name, x, columns, odd=odd)
        self.source = around
        return out

    def product(self, name: str, x: ir.Value, columns: int, *, odd: bool) -> ir.Value:
        """The product and the bias of a linear layer, as `MatMul` or flattened into a `Gemm`."""
        r, rows = self.r, int(list(x.shape or ())[-1])  # pyright: ignore[reportArgumentType]
        shape = [*ROWS, columns]
        bias = self.weight(f"{name}.bias", columns) if r.bias else None
        if not r.gemm:
            out = self.node("MatMul", x, self.stored(name, rows, columns), shape=shape)
            return self.pair("Add", out, bias, shape=shape) if bias is not None else out
        flat = self.node("Reshape", x, self.const([-1, rows]), shape=["batch_size*seq_len", rows])
        weight = self.weight(f"{name}.weight", numbers=r.product(name, rows, columns), layer="linear")
        strange = odd and r.odd == "gemm-beta" and bias is not None
        beta = 0.5 if strange else 1.0
        out = self.node(
            "Gemm", flat, weight, *([bias] if bias is not None else []), alpha=1.0, beta=beta, transA=0, transB=0,
            shape=["batch_size*seq_len", columns],
        )  # fmt: skip
        self.missed["unflatten"] += strange
        self.planted["Gemm"] += not strange
        parts = [self.node("Shape", self.ids, start=i, end=i + 1, shape=[1], dtype=INT) for i in (0, 1)]
        back = self.node("Concat", *parts, self.const([columns]), axis=0, shape=[3], dtype=INT)
        return self.node("Reshape", out, back, shape=shape)

    def heads(self, x: ir.Value, count: int, width: int) -> ir.Value:
        """``[batch, seq, count * width]`` as ``[batch, count, seq, width]``."""
        split = self.node("Reshape", x, self.target([count, width]), shape=[*ROWS, count, width])
        return self.node("Transpose", split, perm=[0, 2, 1, 3], shape=["batch_size", count, "seq_len", width])

    def slice(self, x: ir.Value, start: int, end: int, shape: Sequence[Any]) -> ir.Value:
        """``x[..., start:end]``; an end at the border may be written as the largest number."""
        width = int(shape[-1])
        stop = 2**63 - 1 if end == width and self.pick(2) == 0 else end
        bounds = self.const([start]), self.const([stop]), self.const([3 if self.pick(2) == 0 else -1]), self.const([1])
        return self.node("Slice", x, *bounds, shape=[*shape[:-1], end - start])
