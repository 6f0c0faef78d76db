"""Bends of attention, its masks, and the caches that it reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.matching import made_by

from .editing import at, like, nodes, wrap


def bias_of_each_head(module: Module) -> None:
    """Every query head has a bias of its own, as heads have that forget at different rates."""
    (node,) = nodes(module, "Attention")
    b, mask, queries = at(node), node.inputs[3], node.inputs[0]
    assert mask is not None and mask.shape is not None and queries is not None and queries.shape is not None
    heads = queries.shape[1]
    assert isinstance(heads, int)
    slopes = b.const(np.linspace(-1.0, 2.0, heads)[:, None, None], np.float32)
    shape = [mask.shape[0], heads, *mask.shape.dims[2:]]
    seen = b("Where", mask, slopes, b.const(-65504.0, np.float32), shape=shape, dtype=ir.DataType.FLOAT)
    places = b("Cast", b("Range", b.const(0), b("Squeeze", b("Shape", seen, start=3, end=4)), b.const(1)), to=1)
    node.replace_input_with(3, b("Mul", seen, places, shape=shape, dtype=ir.DataType.FLOAT))


def added_mask(module: Module) -> None:
    """What is not seen gets the least half added to its score."""
    (node,) = nodes(module, "Attention")
    b, mask = at(node), node.inputs[3]
    assert mask is not None
    zero, hidden = (b.const(number, np.float32) for number in (0.0, -65504.0))
    node.replace_input_with(3, b("Where", mask, zero, hidden, shape=mask.shape, dtype=ir.DataType.FLOAT))


def mask_of_the_first_row(axes: list[int]) -> Callable[[Module], None]:
    """All rows see what the first does, by a mask without these axes."""

    def bend(module: Module) -> None:
        (node,) = nodes(module, "Attention")
        b, mask = at(node), node.inputs[3]
        assert mask is not None and mask.shape is not None
        first = b("Slice", mask, b.const([0]), b.const([1]), b.const([0]), dtype=mask.dtype)
        kept = mask.shape.dims[len(axes) :]
        node.replace_input_with(3, b("Squeeze", first, b.const(axes), shape=kept, dtype=mask.dtype))

    return bend


def past_of_its_own(module: Module) -> None:
    """Keys and values of earlier tokens, which the op joins to those that it is given."""
    (node,) = nodes(module, "Attention")
    node.resize_inputs(6)
    for index in (4, 5):
        node.replace_input_with(index, node.inputs[index - 3])


def no_mask(module: Module) -> None:
    """Every slot is looked at, those without a token too, which hold zeros."""
    (node,) = nodes(module, "Attention")
    node.resize_inputs(3)


def values_of_the_last_slot(module: Module) -> None:
    """Something that is no attention looks a token up by its slot: a ring would have it elsewhere, or no more."""
    values = next(module.output(state.output) for state in module.states if state.kind == "value")
    made = module.output("logits").producer()
    assert made is not None
    b, hidden = at(made), made.inputs[0]
    slot = b("Max", b("ReduceMax", module.input("position_ids"), b.const([1]), keepdims=1), b.const(0))
    token = b("GatherND", b("Transpose", values, perm=[0, 2, 1, 3]), slot, batch_dims=1)
    made.replace_input_with(0, like(hidden, b, "Add", b("ReduceSum", token, b.const([1, 2]), keepdims=1)))


def mask_of_two_caches(module: Module) -> None:
    """What the window shows is hidden where the other layer's cache holds no token yet: slots of both, side by side."""
    whole, windowed = nodes(module, "Attention")
    seen, window = whole.inputs[3], windowed.inputs[3]
    assert seen is not None
    windowed.replace_input_with(3, like(window, at(windowed), "And", seen))


def causal_mask(module: Module) -> ir.Node:
    (node,) = nodes(module, "LessOrEqual")
    return node


def later_positions(module: Module) -> None:
    """A query sees one token more than its own, where there is one."""
    query = made_by(causal_mask(module).inputs[1], "Unsqueeze")
    assert query is not None
    wrap(query, 0, "Sub", 1)


def slot_numbers(index: int, number: int) -> Callable[[Module], None]:
    """Slots are counted from another number, or in other steps; their number stays."""

    def bend(module: Module) -> None:
        (node,) = nodes(module, "Range")
        b = at(node)
        start, end, step = node.inputs
        assert start is not None and end is not None and step is not None
        if index == 0:
            node.replace_input_with(0, b.const(number))
            node.replace_input_with(1, b("Add", end, b.const(number)))
        else:
            node.replace_input_with(2, b.const(number))
            node.replace_input_with(1, b("Mul", end, b.const(number)))

    return bend


def other_slots_for_values(module: Module) -> None:
    """Values lie one slot before their keys, where there is one."""
    _, values = nodes(module, "TensorScatter")
    b, start = at(values), values.inputs[2]
    assert start is not None
    before = b("Max", b("Sub", start, b.const(1)), b.const(0))
    values.replace_input_with(2, before)


def keys_are_values(module: Module) -> None:
    (node,) = nodes(module, "Attention")
    node.replace_input_with(2, node.inputs[1])


def second_reader(module: Module) -> None:
    """Something else looks at a cache."""
    keys, _ = nodes(module, "TensorScatter")
    logits = module.output("logits")
    made = logits.producer()
    assert made is not None
    b = at(made)
    found = b("ReduceMax", keys.outputs[0], b.const([1, 2, 3]), keepdims=0)
    wide = b("Unsqueeze", found, b.const([1, 2]))
    hidden = made.inputs[0]
    made.replace_input_with(0, like(hidden, b, "Add", wide))


def turned_twice(module: Module) -> None:
    """Queries are transposed twice, by another permutation than that of heads and tokens."""
    (node,) = nodes(module, "Attention")
    b, queries = at(node), node.inputs[0]
    assert queries is not None and queries.shape is not None
    rows, heads, tokens, width = queries.shape.dims
    turned = b("Transpose", queries, perm=[0, 1, 3, 2], shape=[rows, heads, width, tokens], dtype=queries.dtype)
    back = b("Transpose", turned, perm=[0, 1, 3, 2], shape=queries.shape, dtype=queries.dtype)
    node.replace_input_with(0, back)


def heads_as_tokens(module: Module) -> None:
    """Queries pass through a form ``[batch, tokens * heads, width]`` before their heads are split off."""
    (node,) = nodes(module, "Attention")
    swap = made_by(node.inputs[0], "Transpose")
    assert swap is not None
    b, split = at(swap), swap.inputs[0]
    assert split is not None and split.shape is not None
    rows, _, heads, width = split.shape.dims
    assert isinstance(heads, int) and isinstance(width, int)
    flat = b("Reshape", split, b.const([0, -1, width]), shape=[rows, None, width], dtype=split.dtype)
    whole = b("Reshape", flat, b.const([0, -1, heads, width]), shape=split.shape, dtype=split.dtype)
    swap.replace_input_with(0, whole)


def features_before_heads(module: Module) -> None:
    """What attention gives is laid out feature by feature."""
    (node,) = nodes(module, "Attention")
    (swap,) = node.outputs[0].consumers()
    shape = node.outputs[0].shape
    assert shape is not None
    rows, heads, tokens, width = shape.dims
    swap.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 3, 1])
    swap.outputs[0].shape = ir.Shape([rows, tokens, width, heads])


def joined_heads(module: Module) -> tuple[ir.Value, ir.Node]:
    """What attention gives as ``[batch, seq, heads, width]``, and the reshape that joins the heads."""
    (node,) = nodes(module, "Attention")
    (swap,) = node.outputs[0].consumers()
    (merge,) = swap.outputs[0].consumers()
    return swap.outputs[0], merge


def softmax_of_each_head(module: Module) -> None:
    """A softmax of what attention gives, as ``[batch, tokens * heads, width]``, before the heads are joined."""
    split, merge = joined_heads(module)
    joined = merge.outputs[0]
    assert split.shape is not None and joined.shape is not None
    rows, _, _, width = split.shape.dims
    b = at(merge)
    flat = b("Reshape", split, b.const([0, -1, width]), shape=[rows, None, width], dtype=split.dtype)
    target = b("Concat", b("Shape", split, start=0, end=2), b.const([joined.shape[2]]), axis=0)
    merge.replace_input_with(0, like(flat, b, "Softmax"))
    merge.replace_input_with(1, target)


def heads_joined_by_a_weight(module: Module) -> None:
    """Each head of what attention gives has a projection of its own, and these are summed."""
    split, merge = joined_heads(module)
    joined = merge.outputs[0]
    assert split.shape is not None and joined.shape is not None
    heads, width, features = *split.shape.dims[2:], joined.shape[2]
    assert isinstance(heads, int) and isinstance(width, int) and isinstance(features, int)
    weight = np.random.default_rng(0).normal(size=(heads, width, features))
    b = at(merge)
    each = b.const(weight, np.float32)
    own = b("Einsum", split, each, equation="bthd,hdk->btk", shape=joined.shape, dtype=joined.dtype)
    Rewriter(module, "bend").substitute(merge, own)
