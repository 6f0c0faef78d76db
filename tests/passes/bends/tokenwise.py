"""Bends of what treats each token by itself: activations, norms, the LM head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.matching import scalar

from .editing import at, attribute, like, nodes, replace_logits, set_constant, set_number, wrap


def tiny_sum(module: Module) -> None:
    """``0 / (0 + 1e-9)`` behind the head, which is nothing only while the small number stays."""

    def add(b: OpBuilder, old: ir.Value) -> ir.Value:
        nothing = like(old, b, "Mul", b.const(0.0, np.float32))
        small = like(nothing, b, "Add", b.const(1e-9, np.float32))
        return b("Add", old, like(nothing, b, "Div", small))

    replace_logits(module, add)


def tanh_constant(index: int, number: float) -> Callable[[Module], None]:
    """Bend one of the numbers of the tanh form, found by its value."""
    known = [0.044715, float(np.sqrt(2.0 / np.pi)), 3.0, 0.5]

    def bend(module: Module) -> None:
        for node in module.graph:
            for i, value in enumerate(node.inputs):
                tensor = value.const_value if value is not None else None
                if tensor is not None and tensor.size == 1 and np.isclose(tensor.numpy(), known[index], rtol=1e-6):
                    node.replace_input_with(i, at(node).const(number, np.float32))

    return bend


def gelu_without_half(module: Module) -> None:
    for node in nodes(module, "Mul"):
        if 0.5 in map(scalar, node.inputs):
            whole = next(value for value in node.inputs if scalar(value) != 0.5)
            assert whole is not None
            Rewriter(module, "bend").substitute(node, like(whole, at(node), "Identity"))


def other_root(module: Module) -> None:
    """The error function of another width, spelled with the division of a GELU."""
    set_number(nodes(module, "Div")[0], 1, 1.5)


def said_to_be_exact(module: Module) -> None:
    """The default, spelled out."""
    nodes(module, "Gelu")[0].attributes["approximate"] = ir.AttrString("approximate", "none")


def large_integers(module: Module) -> None:
    """Positions a hundred thousand later, of which the remainder is added to the logits."""

    def add(b: OpBuilder, old: ir.Value) -> ir.Value:
        later = b("Add", module.input("position_ids"), b.const(100_000))
        rest = b("Cast", b("Mod", later, b.const(7)), to=int(ir.DataType.FLOAT))
        return b("Add", old, b("Unsqueeze", rest, b.const([2])))

    replace_logits(module, add)


def mean_over_tokens(module: Module) -> None:
    set_constant(nodes(module, "ReduceMean")[0], 1, [1])


def norm_of_a_gate(module: Module) -> None:
    """What is normalized is scaled by a number of each token's own features, itself."""
    (normal,) = nodes(module, "Reciprocal")[0].outputs[0].consumers()
    (scaled,) = normal.outputs[0].consumers()
    index = next(i for i, value in enumerate(scaled.inputs) if value is not normal.outputs[0])
    scaled.replace_input_with(index, normal.inputs[0])


def norm_of_a_number(module: Module) -> None:
    """What is normalized is scaled by one number for all features."""
    (normal,) = nodes(module, "Reciprocal")[0].outputs[0].consumers()
    (scaled,) = normal.outputs[0].consumers()
    index = next(i for i, value in enumerate(scaled.inputs) if value is not normal.outputs[0])
    set_number(scaled, index, 0.7)


def softmax_over_tokens(module: Module) -> None:
    replace_logits(module, lambda b, old: b("Softmax", old, axis=1))


def sum_with_other_tokens(module: Module) -> None:
    """Something else of every token is added behind the head."""

    def add(b: OpBuilder, old: ir.Value) -> ir.Value:
        positions = b("Unsqueeze", b("Cast", module.input("position_ids"), to=int(ir.DataType.FLOAT)), b.const([2]))
        return b("Add", old, positions)

    replace_logits(module, add)


def sum_with_turned_tokens(module: Module) -> None:
    """Positions are added behind the head, turned as a stored weight would be."""

    def add(b: OpBuilder, old: ir.Value) -> ir.Value:
        assert old.shape is not None
        positions = b("Unsqueeze", b("Cast", module.input("position_ids"), to=int(ir.DataType.FLOAT)), b.const([0]))
        shape = [*old.shape.dims[:2], 1]
        return b("Add", old, b("Transpose", positions, perm=[1, 2, 0], shape=shape, dtype=old.dtype))

    replace_logits(module, add)


def swish_factor(module: Module) -> None:
    nodes(module, "Swish")[0].attributes["alpha"] = ir.AttrFloat32("alpha", 1.7)


def saturating(number: int) -> Callable[[Module], None]:
    return attribute("Cast", "saturate", number)


def small_epsilon(module: Module) -> None:
    """An epsilon far below the default's, for hidden states whose squares are as small."""
    node = nodes(module, "RMSNormalization")[0]
    wrap(node, 0, "Mul", 1e-4)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-9)


def norm_without_epsilon(module: Module) -> None:
    """The standard's 1e-5, for hidden states whose squares are as small."""
    node = nodes(module, "RMSNormalization")[0]
    wrap(node, 0, "Mul", 1e-3)
    del node.attributes["epsilon"]
