"""Bends of linear layers: flattened, transposed, laid out otherwise."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.matching import made_by

from .editing import at, nodes, set_int, stored


def gemm_factor(name: str) -> Callable[[Module], None]:
    def bend(module: Module) -> None:
        nodes(module, "Gemm")[0].attributes[name] = ir.AttrFloat32(name, 0.5)

    return bend


def around_gemm(module: Module) -> tuple[ir.Node, ir.Node, ir.Node]:
    """A Gemm of as many features as it takes, and the reshapes around it."""
    for node in nodes(module, "Gemm"):
        flat, (back,) = made_by(node.inputs[0], "Reshape"), list(node.outputs[0].consumers())
        weight = node.inputs[1]
        assert flat is not None and weight is not None and weight.shape is not None
        if weight.shape[0] == weight.shape[1]:
            return flat, node, back
    raise AssertionError("no Gemm is square")


def transposed_gemm(module: Module) -> None:
    set_int(around_gemm(module)[1], "transB", 1)


def other_rows(module: Module) -> None:
    """Tokens stand before rows behind the layer: as many numbers, in other places."""
    _, _, back = around_gemm(module)
    out, b = back.outputs[0], at(back)
    assert out.shape is not None
    width = out.shape[2]
    ids = module.input("input_ids")
    swapped = b("Concat", b("Shape", ids, start=1, end=2), b("Shape", ids, start=0, end=1), b.const([width]), axis=0)
    back.replace_input_with(1, swapped)
    out.shape = ir.Shape(["seq_len", "batch_size", width])
    uses = list(out.uses())
    turned = at(uses[0].node)("Transpose", out, perm=[1, 0, 2], shape=["batch_size", "seq_len", width], dtype=out.dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, turned)


def split_features(module: Module) -> None:
    """The layer takes a half of a token's features at a time: a block-diagonal layer."""
    flat, gemm, back = around_gemm(module)
    weight, data, out = gemm.inputs[1], flat.inputs[0], back.outputs[0]
    assert weight is not None and weight.shape is not None and data is not None and data.shape is not None
    width = weight.shape[0]
    assert isinstance(width, int) and len(data.shape) == 3
    b, half = at(gemm), width // 2
    split = b("Reshape", data, b.const([0, 0, 2, half]), shape=[*data.shape.dims[:2], 2, half], dtype=data.dtype)
    gemm.replace_input_with(0, b("Reshape", split, b.const([-1, half]), shape=[None, half], dtype=data.dtype))
    small = b("Slice", weight, b.const([0, 0]), b.const([half, half]), b.const([0, 1]), shape=[half, half])
    bias = b("Slice", gemm.inputs[2], b.const([0]), b.const([half]), b.const([0]), shape=[half])
    gemm.replace_input_with(1, small)
    gemm.replace_input_with(2, bias)
    small.dtype = bias.dtype = gemm.outputs[0].dtype = ir.DataType.FLOAT
    gemm.outputs[0].shape = ir.Shape([None, half])
    assert out.shape is not None and out.shape[2] == width


def halves_behind(module: Module) -> None:
    """Tokens come back with their features in two halves, side by side in an axis of their own."""
    _, _, back = around_gemm(module)
    out = back.outputs[0]
    assert out.shape is not None
    rows, tokens, width = out.shape.dims
    assert isinstance(width, int)
    ids = module.input("input_ids")
    uses = list(out.uses())
    back.replace_input_with(1, at(back)("Concat", at(back)("Shape", ids), at(back).const([2, width // 2]), axis=0))
    out.shape = ir.Shape([rows, tokens, 2, width // 2])
    whole = at(uses[0].node)(
        "Reshape", out, at(back).const([0, 0, width]), shape=[rows, tokens, width], dtype=out.dtype
    )
    for use in uses:
        use.node.replace_input_with(use.idx, whole)


def stacked_weight(module: Module) -> None:
    """A weight of three axes, turned into ``[1, in, out]``."""
    node = next(n for n in nodes(module, "MatMul") if made_by(n.inputs[1], "Transpose") is None)
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    stacked = stored(weight, weight.const_value.numpy().T[:, None, :], module.graph)
    turned = at(node)("Transpose", stacked, perm=[1, 2, 0], dtype=ir.DataType.FLOAT)
    turned.shape = ir.Shape([1, *(weight.shape or ())])
    node.replace_input_with(1, turned)


def turned_weight_with_bias(module: Module) -> None:
    """A `Gemm` whose weight is stored the other way round."""
    node = nodes(module, "Gemm")[0]
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    turned = stored(weight, weight.const_value.numpy().T, module.graph)
    node.replace_input_with(1, at(node)("Transpose", turned, perm=[1, 0], shape=weight.shape, dtype=weight.dtype))
