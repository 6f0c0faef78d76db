"""What computes the new keys or values of a layer, followed down to where each head has weights of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.weights import repeated, stored

Sizes = tuple[int, int]
"""Key/value heads, and the width of one."""

_OF_FEATURES = frozenset({
    "Add", "Cast", "Clip", "Div", "Identity", "LayerNormalization", "MatMul", "Max", "Min", "Mul", "Neg",
    "RMSNormalization", "Reshape", "Sigmoid", "Sub", "Sum", "Tanh", "Transpose",
})  # fmt: skip
"""Operators that make the same of a feature when each head stands there several times, over all heads at once."""


@dataclass(frozen=True)
class Branch:
    """The nodes between the products that make keys or values, these included, and the update of the cache.

    Attributes:
        nodes: In the order of the graph.
        sizes: Of the heads.
    """

    nodes: list[ir.Node]
    sizes: Sizes

    def replicate(self, rewriter: Rewriter, times: int) -> None:
        """Repeat what the nodes read for each head, and tell all that they make of its size."""
        sides = [(node, index, value, axis) for node in self.nodes for index, value, axis in self._sides(node)]
        for node, index, value, axis in sides:
            node.replace_input_with(index, self._repeated(rewriter, node, value, axis, times))
        for node in self.nodes:
            for out in node.outputs:
                axis = head_axis(out, self.sizes)
                assert axis is not None and out.shape is not None
                dims = list(out.shape.dims)
                dims[axis] = int(out.shape[axis]) * times  # pyright: ignore[reportArgumentType]
                out.shape = ir.Shape(dims)
            if node.op_type == "Reshape":
                node.replace_input_with(1, rewriter.at(node).const(_target(node)))

    def problem(self) -> str | None:
        """Why the heads cannot be told apart on the way, or `None`."""
        for node in self.nodes:
            axes = {head_axis(out, self.sizes) for out in node.outputs}
            flat = any(out.shape is not None and len(out.shape) == 3 for out in node.outputs)
            along = node.attributes.get_int("axis", -1)
            mixes = node.op_type not in _OF_FEATURES if flat else along in axes
            if None in axes or mixes or "num_heads" in node.attributes:
                return f"{node.op_type} does not keep the heads apart"
            if node.op_type == "Reshape" and _target(node) is None:
                return "a Reshape moves axes of unknown length"
        return None

    def _sides(self, node: ir.Node) -> list[tuple[int, ir.Value, int]]:
        """Inputs that have something for each head and come from elsewhere: number, value, and the axis."""
        out, (heads, width) = node.outputs[0], self.sizes
        axis = head_axis(out, self.sizes)
        if node.op_type in ("Reshape", "Transpose") or axis is None or out.shape is None:
            return []
        found: list[tuple[int, ir.Value, int]] = []
        for index, value in enumerate(node.inputs):
            if value is None or value.shape is None or value.producer() in self.nodes:
                continue
            if node.op_type == "MatMul" and index == 0:
                continue
            own = len(value.shape) - len(out.shape) + axis
            size = heads * width if len(out.shape) == 3 else heads
            if own >= 0 and value.shape[own] == size > 1:
                found.append((index, value, own))
        return found

    def _repeated(self, rewriter: Rewriter, node: ir.Node, value: ir.Value, axis: int, times: int) -> ir.Value:
        heads, width = self.sizes
        assert value.shape is not None
        block, weight = (1 if value.shape[axis] == heads else width), _weight(node, value)
        if weight is None:
            order = np.arange(heads * block).reshape(heads, 1, block).repeat(times, axis=1).reshape(-1)
            return rewriter.at(node)("Gather", value, rewriter.at(node).const(order), axis=axis)
        kept, turned = weight
        name = f"{kept.metadata_props[WEIGHT_KEY]}_{times}_times"
        known = rewriter.graph.initializers.get(name)
        made = known if known is not None else repeated(rewriter, name, kept, 0 if turned else axis, block, times)
        return rewriter.at(node)("Transpose", made, perm=[1, 0]) if turned else made


def branch(update: ir.Node) -> Branch | str:
    """What ends in a cache's update, or why it cannot be followed."""
    new = update.inputs[1]
    sizes = head_sizes(update)
    if new is None or sizes is None:
        return "the sizes of the heads are not known"
    features = sizes[0] * sizes[1]
    above: dict[ir.Node, None] = {}
    products: list[ir.Node] = []
    todo = [new.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in above:
            continue
        above[node] = None
        if node.op_type == "MatMul" and (stored(node) is not None or _last(node.outputs[0]) == features):
            products.append(node)
        else:
            todo += [value.producer() for value in node.inputs if value is not None]
    if not any(stored(node) is not None for node in products):
        return "no product with a weight makes the keys or values"
    nodes = dict.fromkeys(products)
    todo = list(products)
    while todo:
        for user in (user for out in todo.pop().outputs for user in out.consumers()):
            if user in above and user not in nodes:
                nodes[user] = None
                todo.append(user)
            elif user not in above and user is not update:
                return "something else reads what becomes the keys or values"
    made = Branch([node for node in update.graph or () if node in nodes], sizes)
    return made.problem() or made


def head_sizes(update: ir.Node) -> Sizes | None:
    """Heads of what a cache is given, and the width of one."""
    new = update.inputs[1]
    if new is None or new.shape is None or len(new.shape) != 4:
        return None
    heads, width = new.shape[1], new.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def head_axis(value: ir.Value, sizes: Sizes) -> int | None:
    """The axis of the heads, or of the features of all of them."""
    if value.shape is None:
        return None
    if len(value.shape) == 3:
        return 2 if value.shape[2] == sizes[0] * sizes[1] else None
    found = [axis for axis in (1, 2) if len(value.shape) > 3 and isinstance(value.shape[axis], int)]
    return found[0] if len(found) == 1 and value.shape[found[0]] == sizes[0] else None


def _weight(node: ir.Node, value: ir.Value) -> tuple[ir.Value, bool] | None:
    """The weight that an input is, and whether it is read through a `Transpose`; `None` of what runs compute."""
    product = stored(node)
    if product is not None and value is node.inputs[1]:
        return product.value, product.transposed
    known = value.const_value is not None and WEIGHT_KEY in value.metadata_props
    return (value, False) if known else None


def _last(value: ir.Value) -> object:
    return value.shape[-1] if value.shape is not None and len(value.shape) else None


def _target(node: ir.Node) -> list[int] | None:
    """What a `Reshape` is told, by its result; `None` where axes of unknown length move."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    told = [d if isinstance(d, int) else 0 for d in result.shape.dims]
    pairs = zip(result.shape.dims, source.shape.dims, strict=False)
    moved = [d for d, old in pairs if not isinstance(d, int) and d != old]
    return None if moved or (len(result.shape) > len(source.shape) and 0 in told[len(source.shape) :]) else told
