"""The small edits that bends are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import OpBuilder, Rewriter


def nodes(module: Module, op_type: str) -> list[ir.Node]:
    found = [node for node in module.graph if node.op_type == op_type]
    assert found, f"there is no {op_type} to bend"
    return found


def at(node: ir.Node) -> OpBuilder:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return Rewriter(Module(ir.Model(graph, ir_version=11), "bent"), "bend").at(node)


def like(value: ir.Value | None, b: OpBuilder, op_type: str, *more: ir.Value) -> ir.Value:
    """``op_type(value, *more)``, of the same shape."""
    assert value is not None
    return b(op_type, value, *more, shape=value.shape, dtype=value.dtype)


def wrap(node: ir.Node, index: int, op_type: str, *more: float) -> None:
    """Put an operator before an input of a node."""
    b, value = at(node), node.inputs[index]
    assert value is not None and value.dtype is not None
    constants = [b.const(number, value.dtype.numpy()) for number in more]
    node.replace_input_with(index, like(value, b, op_type, *constants))


def set_constant(node: ir.Node, index: int, number: list[int] | int) -> None:
    node.replace_input_with(index, at(node).const(number))


def set_number(node: ir.Node, index: int, number: float) -> None:
    node.replace_input_with(index, at(node).const(number, np.float32))


def set_int(node: ir.Node, name: str, number: int) -> None:
    node.attributes[name] = ir.AttrInt64(name, number)


def replace_logits(module: Module, make: Callable[[OpBuilder, ir.Value], ir.Value]) -> None:
    old = module.output("logits")
    end = ir.node("Identity", [old])
    module.graph.append(end)
    new = make(at(end), old)
    assert old.dtype is not None
    new.shape, new.dtype = old.shape, old.dtype
    module.graph.remove(end, safe=True)
    old.name, new.name = "inner", "logits"
    module.graph.outputs[0] = new


def stored(weight: ir.Value, numbers: np.ndarray, graph: ir.Graph) -> ir.Value:
    """A weight in the place of another, laid out anew."""
    array = np.ascontiguousarray(numbers)
    made = ir.val("stored", const_value=ir.tensor(array, name="stored"))
    made.metadata_props.update(weight.metadata_props)
    graph.register_initializer(made)
    return made


def no_attribute(op_type: str, name: str) -> Callable[[Module], None]:
    """Every such operator by the standard's default."""

    def bend(module: Module) -> None:
        for node in nodes(module, op_type):
            node.attributes.pop(name, None)

    return bend


def attribute(op_type: str, name: str, number: int) -> Callable[[Module], None]:
    return lambda module: set_int(nodes(module, op_type)[0], name, number)
