"""Small questions that passes ask of a graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qeff_ir.ir.module import WEIGHT_KEY


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, if it is of that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; `None` when it is left out, be it between others or at the end."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant(value: ir.Value | None) -> Any:
    """The value of a small constant as nested Python lists or a scalar; `None` when it is not one.

    Weights are never read, and what counts as a constant is the same however the tensor is stored: at most 64 elements.
    """
    tensor = value.const_value if value is not None else None
    if value is None or tensor is None or WEIGHT_KEY in value.metadata_props or tensor.size > 64:
        return None
    return tensor.numpy().tolist()


def scalar(value: ir.Value | None) -> float | int | None:
    """The number that a constant of one element holds, whatever its rank; `None` when it is not one."""
    number = constant(value)
    while isinstance(number, list) and len(number) == 1:
        number = number[0]
    return number if isinstance(number, int | float) else None


def slice_bounds(value: ir.Value | None, axis: int) -> tuple[ir.Value, int, int] | None:
    """``(data, start, end)`` when `value` is a step-1 slice of `data` along `axis` only, with constant bounds."""
    node = made_by(value, "Slice")
    if node is None or len(node.inputs) < 4 or node.inputs[0] is None:
        return None
    data, start, end = node.inputs[0], scalar(node.inputs[1]), scalar(node.inputs[2])
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    if constant(node.inputs[3]) not in ([axis], [axis - len(data.shape or ())]) or step != 1:
        return None
    return (data, int(start), int(end)) if start is not None and end is not None else None


def same_size(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two dims are known to be equal; a dim without a name or a number is equal to none, itself included."""
    return one == other and not (isinstance(one, ir.SymbolicDim) and one.value is None)


def depends_on(value: ir.Value, targets: set[ir.Value]) -> bool:
    """Whether `value` is computed from any of `targets`."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        at = stack.pop()
        if at in targets:
            return True
        node = at.producer()
        if at in seen or node is None:
            continue
        seen.add(at)
        stack.extend(v for v in node.inputs if v is not None)
    return False
