"""Each condition of what a pass matches: graphs that are bent in one place, whose numbers must stay what they were.

A bend is an edit that makes a sound graph another sound graph. The pass must then leave the bent place alone, or
rewrite it as it now is; both show in the numbers, which are compared with those of the bent graph before the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from backends import find_backend
from passes._rows import size
from passes.fuse_activations import FuseActivations
from passes.fuse_norms import FuseNorms
from passes.legalize import Legalize
from qeff_ir.errors import PassError
from qeff_ir.module import SOURCE_KEY, Module
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.matching import made_by, scalar
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.testing import tolerance
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import module_answers, options, prepare, session_answers
from qeff_ir.testing.recipe import Layer, Recipe
from qeff_ir.testing.strategies import Request
from tests import support
from tests.properties import EDGE, FULL, LONG

PLAIN = Recipe((Layer(),), head_dim=16, value_dim=16, rotary="half", gemm=True, bias=True)
"""What every pass finds something in."""

STATES = "canonicalize,fuse-rotary,last-logits,kv-retention{layout=tensor-scatter},attention{impl=standard}"
DEVICE = "canonicalize,fuse-norms,fuse-rotary,fuse-activations,last-logits,kv-retention,attention"


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


# unflatten


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


# fuse-rotary


def turned_halves(module: Module) -> tuple[ir.Node, ir.Node, ir.Node]:
    """Of one rotation: ``Concat(-high, low)``, and the slices that make ``high`` and ``low``."""
    concat = next(n for n in nodes(module, "Concat") if made_by(n.inputs[0], "Neg") is not None)
    negation = made_by(concat.inputs[0], "Neg")
    assert negation is not None
    high, low = made_by(negation.inputs[0], "Slice"), made_by(concat.inputs[1], "Slice")
    assert high is not None and low is not None
    return concat, high, low


def shifted_low(module: Module) -> None:
    _, _, low = turned_halves(module)
    set_constant(low, 1, [1])
    set_constant(low, 2, [9])


def shifted_high(module: Module) -> None:
    _, high, _ = turned_halves(module)
    set_constant(high, 1, [7])
    set_constant(high, 2, [15])


def high_of_another(module: Module) -> None:
    _, high, _ = turned_halves(module)
    wrap(high, 0, "Mul", 0.5)


def factor_of(op_type: str) -> Callable[[Module], None]:
    """Scaled cosines or sines, as long contexts have them: still a rotation, which must keep its scale."""

    def bend(module: Module) -> None:
        node = nodes(module, op_type)[0]
        out = node.outputs[0]
        for use in list(out.uses()):
            b = at(use.node)
            use.node.replace_input_with(use.idx, like(out, b, "Mul", b.const(0.7, np.float32)))

    return bend


def plain_part_of_another(module: Module) -> None:
    """The part that is not turned, behind its cosine, is half as large: no rotation."""
    concat, _, low = turned_halves(module)
    (sines,) = concat.outputs[0].consumers()
    (total,) = sines.outputs[0].consumers()
    plain = made_by(next(v for v in total.inputs if v is not sines.outputs[0]), "Mul")
    assert plain is not None
    x, cosine = low.inputs[0], next(v for v in plain.inputs if v is not low.inputs[0])
    plain.replace_input_with(0, cosine)
    plain.replace_input_with(1, x)
    wrap(plain, 1, "Mul", 0.5)


def factor_of_each_angle(module: Module) -> None:
    """Cosines times a number of their own in both halves."""
    out = nodes(module, "Cos")[0].outputs[0]
    assert out.shape is not None
    width = out.shape[-1]
    assert isinstance(width, int)
    for use in list(out.uses()):
        b = at(use.node)
        use.node.replace_input_with(use.idx, like(out, b, "Mul", b.const(np.linspace(0.5, 1.5, width), np.float32)))


def angles_of_the_first_row(module: Module) -> None:
    """All rows are turned as the first is."""
    (angles,) = {n.inputs[0] for n in nodes(module, "Concat") if n.inputs[0] is n.inputs[1]}
    assert angles is not None and angles.shape is not None
    (concat,) = angles.consumers()
    b = at(concat)
    first = b("Slice", angles, b.const([0]), b.const([1]), b.const([0]), shape=[1, *angles.shape.dims[1:]])
    first.dtype = angles.dtype
    for index in range(2):
        concat.replace_input_with(index, first)
    turns = list(concat.outputs[0].consumers())  # cosines and sines, and the axis of heads behind each
    for node in (concat, *turns, *(n for turn in turns for n in turn.outputs[0].consumers())):
        out = node.outputs[0]
        assert out.shape is not None
        out.shape = ir.Shape([1, *out.shape.dims[1:]])


def angles_in_three_parts(module: Module) -> None:
    """A third of the angles three times: what the halves of a head are turned by is not the same."""
    (angles,) = {n.inputs[0] for n in nodes(module, "Concat") if n.inputs[0] is n.inputs[1]}
    assert angles is not None and angles.shape is not None
    (concat,) = angles.consumers()
    *dims, half = angles.shape.dims
    assert isinstance(half, int)
    third, b = 2 * half // 3, at(concat)
    part = b("Slice", angles, b.const([0]), b.const([third]), b.const([2]), shape=[*dims, third], dtype=angles.dtype)
    concat.resize_inputs(3)
    for index in range(3):
        concat.replace_input_with(index, part)


# canonicalize


def tiny_sum(module: Module) -> None:
    """``0 / (0 + 1e-9)`` behind the head, which is nothing only while the small number stays."""

    def add(b: OpBuilder, old: ir.Value) -> ir.Value:
        nothing = like(old, b, "Mul", b.const(0.0, np.float32))
        small = like(nothing, b, "Add", b.const(1e-9, np.float32))
        return b("Add", old, like(nothing, b, "Div", small))

    replace_logits(module, add)


# fuse-activations


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


# fuse-norms


def mean_over_tokens(module: Module) -> None:
    set_constant(nodes(module, "ReduceMean")[0], 1, [1])


# attention


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


def no_mask(module: Module) -> None:
    """Every slot is looked at, those without a token too, which hold zeros."""
    (node,) = nodes(module, "Attention")
    node.resize_inputs(3)


# kv-retention


def values_of_the_last_slot(module: Module) -> None:
    """Something that is no attention looks a token up by its slot: a ring would have it elsewhere, or no more."""
    values = next(module.output(state.output) for state in module.states if state.role == "value")
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


# last-logits


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


def replace_logits(module: Module, make: Callable[[OpBuilder, ir.Value], ir.Value]) -> None:
    old = module.output("logits")
    end = ir.node("Identity", [old])
    module.graph.append(end)
    new = make(at(end), old)
    new.shape, new.dtype = old.shape, old.dtype
    module.graph.remove(end, safe=True)
    old.name, new.name = "inner", "logits"
    module.graph.outputs[0] = new


# ort-attention, ort-rotary, ort-kernels


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


def neighbors_turned(module: Module) -> None:
    for node in nodes(module, "RotaryEmbedding"):
        set_int(node, "interleaved", 1)


def angles_from_a_table(module: Module) -> None:
    """Cosines and sines of every position are weights, and looked up by the operator itself."""
    rotations = nodes(module, "RotaryEmbedding")
    b = at(rotations[0])
    half = size(rotations[0].inputs[1], 2)
    assert half is not None
    angles = np.outer(np.arange(LONG.ctx_len), 0.5 ** np.arange(half))
    tables = [b.const(numbers, np.float32) for numbers in (np.cos(angles), np.sin(angles))]
    positions = b("Max", module.input("position_ids"), b.const(0))
    for node in rotations:
        node.resize_inputs(4)
        for index, value in enumerate((*tables, positions), start=1):
            node.replace_input_with(index, value)


def other_sines(module: Module) -> None:
    _, keys = nodes(module, "RotaryEmbedding")
    wrap(keys, 2, "Mul", 0.5)


def scaled_angles(module: Module) -> None:
    """Cosines of both by one number: still in the kernel's power."""
    queries, keys = nodes(module, "RotaryEmbedding")
    b = at(queries)
    scaled = like(queries.inputs[1], b, "Mul", b.const(0.7, np.float32))
    for node in (queries, keys):
        node.replace_input_with(1, scaled)


def cosines_summed(module: Module) -> None:
    """Each token's cosines and those of all tokens before it in the run."""
    queries, keys = nodes(module, "RotaryEmbedding")
    b = at(queries)
    summed = like(queries.inputs[1], b, "CumSum", b.const(1))
    for node in (queries, keys):
        node.replace_input_with(1, summed)


def stored(weight: ir.Value, numbers: np.ndarray, graph: ir.Graph) -> ir.Value:
    """A weight in the place of another, laid out anew."""
    array = np.ascontiguousarray(numbers)
    made = ir.val("stored", const_value=ir.tensor(array, name="stored"))
    made.metadata_props.update(weight.metadata_props)
    graph.register_initializer(made)
    return made


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


def swish_factor(module: Module) -> None:
    nodes(module, "Swish")[0].attributes["alpha"] = ir.AttrFloat32("alpha", 1.7)


def no_attribute(op_type: str, name: str) -> Callable[[Module], None]:
    """Every such operator by the standard's default."""

    def bend(module: Module) -> None:
        for node in nodes(module, op_type):
            node.attributes.pop(name, None)

    return bend


# legalize


def attribute(op_type: str, name: str, number: int) -> Callable[[Module], None]:
    return lambda module: set_int(nodes(module, op_type)[0], name, number)


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


def fourth_input(module: Module) -> None:
    """Positions for the rotation to look up its own angles by."""
    queries = nodes(module, "RotaryEmbedding")[0]
    queries.resize_inputs(4)
    queries.replace_input_with(3, module.input("position_ids"))


@dataclass(frozen=True)
class Bend:
    """What is bent, and what the pass makes of it.

    Attributes:
        before: Pipeline up to the pass.
        step: The pass.
        change: The bend.
        less: How many rewrites fewer there are than without; none where the bent place is rewritten all the same.
        refused: What the pass says when it refuses the module.
        recipe: The decoder.
        request: What it is asked.
    """

    before: str
    step: str
    change: Callable[[Module], None]
    less: int = 1
    refused: str | None = None
    recipe: Recipe = PLAIN
    request: Request = EDGE


ROTARY = f"{STATES},ort-attention"
SQUARE = Recipe((Layer(),), kv_heads=1, group=1, head_dim=8, value_dim=8, gemm=True, bias=True)
GROUPS = Recipe((Layer(),), kv_heads=2, group=3, head_dim=8, value_dim=8)
ONE_GROUP = Recipe((Layer(),), group=2, head_dim=16, value_dim=16)
THIRDS = Recipe((Layer(),), head_dim=24, value_dim=24, rotary="half")
WINDOW = Recipe((Layer(window=3),))
SCALED = Recipe((Layer(),), head_dim=16, value_dim=16, scale=0.4, softcap=2.0)
ERF = Recipe((Layer(),), activation="gelu")
TANH = Recipe((Layer(),), activation="gelu-tanh")

BENDS = {
    "gemm alpha": Bend("canonicalize", "unflatten", gemm_factor("alpha")),
    "gemm beta": Bend("canonicalize", "unflatten", gemm_factor("beta")),
    "gemm transposed": Bend("canonicalize", "unflatten", transposed_gemm, recipe=SQUARE),
    "rows swapped": Bend("canonicalize", "unflatten", other_rows, recipe=SQUARE),
    "features split": Bend("canonicalize", "unflatten", split_features, recipe=SQUARE),
    "halves behind": Bend("canonicalize", "unflatten", halves_behind, recipe=SQUARE),
    "lower half shifted": Bend("canonicalize", "fuse-rotary", shifted_low),
    "upper half shifted": Bend("canonicalize", "fuse-rotary", shifted_high),
    "halves of two values": Bend("canonicalize", "fuse-rotary", high_of_another),
    "cosines scaled": Bend("canonicalize", "fuse-rotary", factor_of("Cos"), less=0),
    "sines scaled": Bend("canonicalize", "fuse-rotary", factor_of("Sin"), less=0),
    "plain part of another": Bend("canonicalize", "fuse-rotary", plain_part_of_another),
    "angles of their own": Bend("canonicalize", "fuse-rotary", factor_of_each_angle, less=2),
    "angles of the first row": Bend("canonicalize", "fuse-rotary", angles_of_the_first_row, less=0),
    "angles in three parts": Bend("canonicalize", "fuse-rotary", angles_in_three_parts, less=2, recipe=THIRDS),
    "tiny sum": Bend("canonicalize", "canonicalize", tiny_sum, less=0),
    **{
        f"tanh number {index}": Bend("canonicalize", "fuse-activations", tanh_constant(index, number), recipe=TANH)
        for index, number in enumerate([0.0449, 0.8, 2.0, 0.51])
    },
    "gelu without its half": Bend("canonicalize", "fuse-activations", gelu_without_half, recipe=ERF),
    "gelu of another root": Bend("canonicalize", "fuse-activations", other_root, recipe=ERF),
    "mean over tokens": Bend("canonicalize", "fuse-norms", mean_over_tokens),
    "bias of each head": Bend("canonicalize", "attention", bias_of_each_head, less=0, recipe=GROUPS),
    "no mask": Bend("canonicalize", "attention", no_mask, less=0, recipe=GROUPS),
    "no mask, in slots": Bend("canonicalize", "kv-retention", no_mask, less=0, recipe=GROUPS),
    "no mask, in a window": Bend("canonicalize", "kv-retention", no_mask, less=0, recipe=WINDOW, request=FULL),
    "no mask, for the kernel": Bend(STATES, "ort-attention", no_mask),
    **{
        f"{name} by default": Bend("canonicalize", "attention", no_attribute("Attention", name), less=0, recipe=SCALED)
        for name in ("scale", "softcap")
    },
    **{
        f"{name} by default, in the kernel": Bend(
            STATES, "ort-attention", no_attribute("Attention", name), less=0, recipe=SCALED
        )
        for name in ("scale", "softcap")
    },
    "causal by itself": Bend(
        "canonicalize", "attention", attribute("Attention", "is_causal", 1), refused="counts tokens or keeps a cache"
    ),
    "causal by itself, for the kernel": Bend(STATES, "ort-attention", attribute("Attention", "is_causal", 1)),
    "values of the last slot": Bend(
        "canonicalize",
        "kv-retention{layout=tensor-scatter}",
        values_of_the_last_slot,
        less=0,
        recipe=WINDOW,
        request=LONG,
    ),
    "mask of two caches": Bend(
        "canonicalize",
        "kv-retention{layout=tensor-scatter}",
        mask_of_two_caches,
        less=0,
        recipe=Recipe((Layer(), Layer(window=3))),
        request=LONG,
    ),
    "softmax over tokens": Bend(
        "canonicalize,unflatten", "last-logits", softmax_over_tokens, refused="not a matrix product"
    ),
    "logits of two": Bend(
        "canonicalize,unflatten", "last-logits", sum_with_other_tokens, refused="not a matrix product"
    ),
    "logits of tokens turned": Bend(
        "canonicalize,unflatten", "last-logits", sum_with_turned_tokens, refused="not a matrix product"
    ),
    "turned twice": Bend(STATES, "ort-attention", turned_twice, less=0, recipe=ONE_GROUP),
    "heads as tokens": Bend(STATES, "ort-attention", heads_as_tokens, less=0, recipe=ONE_GROUP),
    "features before heads": Bend(STATES, "ort-attention", features_before_heads, less=0, recipe=ONE_GROUP),
    "neighbors turned, in attention": Bend(STATES, "ort-attention", neighbors_turned, less=0),
    "angles from a table": Bend(STATES, "ort-attention", angles_from_a_table, less=0),
    "angles from a table, in the kernel": Bend(ROTARY, "ort-rotary", angles_from_a_table),
    "positions moved": Bend(STATES, "ort-attention", later_positions),
    "slots from one": Bend(STATES, "ort-attention", slot_numbers(0, 1)),
    "slots in steps": Bend(STATES, "ort-attention", slot_numbers(2, 2)),
    "values elsewhere": Bend(STATES, "ort-attention", other_slots_for_values),
    "keys for values": Bend(STATES, "ort-attention", keys_are_values),
    "second reader": Bend(STATES, "ort-attention", second_reader),
    "sines of keys": Bend(ROTARY, "ort-rotary", other_sines),
    "angles scaled": Bend(ROTARY, "ort-rotary", scaled_angles, less=0),
    "cosines summed": Bend(ROTARY, "ort-rotary", cosines_summed),
    "stacked weight": Bend("canonicalize,unflatten", "ort-kernels", stacked_weight, less=0),
    "turned weight with bias": Bend("canonicalize", "ort-kernels", turned_weight_with_bias, less=0),
    "swish factor": Bend("canonicalize,fuse-activations", "ort-kernels", swish_factor, less=0),
    "swish factor, lowered": Bend(DEVICE, "legalize", swish_factor, less=0),
    "swish without factor": Bend(
        "canonicalize,fuse-activations", "ort-kernels", no_attribute("Swish", "alpha"), less=0
    ),
    "swish without factor, lowered": Bend(DEVICE, "legalize", no_attribute("Swish", "alpha"), less=0),
    "norm without epsilon": Bend(DEVICE, "legalize", norm_without_epsilon, less=0),
    "small epsilon": Bend(DEVICE, "legalize", small_epsilon, less=0),
    "norm axis": Bend(DEVICE, "legalize", attribute("RMSNormalization", "axis", 1), refused="no attribute 'axis'"),
    "neighbors turned": Bend(
        DEVICE, "legalize", attribute("RotaryEmbedding", "interleaved", 1), refused="no attribute 'interleaved'"
    ),
    "angles looked up": Bend(DEVICE, "legalize", fourth_input, refused="takes 3 inputs, not 4"),
    "cast unbounded": Bend(DEVICE, "legalize", saturating(0), refused="attribute 'saturate' of Cast"),
    "cast bounded": Bend(DEVICE, "legalize", saturating(1), less=0),
}


def fired(module: Module, step: str) -> int:
    (run,) = support.apply(module, step).runs
    return sum(run.stats.fired.values())


@pytest.mark.parametrize("bend", BENDS.values(), ids=BENDS)
def test_a_bent_graph_keeps_its_numbers(bend: Bend) -> None:
    start = prepare(build(bend.recipe).module, bend.request)
    module = start.clone()
    support.apply(module, bend.before)
    straight = module.clone()
    bend.change(module)
    if bend.refused is not None:
        with pytest.raises(PassError, match=bend.refused):
            support.apply(module, bend.step)
        assert fired(straight, bend.step) > 0
        return
    before = module_answers(module, bend.request, start)
    assert fired(module, bend.step) == fired(straight, bend.step) - bend.less
    error = tolerance.error_over_rms(module_answers(module, bend.request, start), before)
    assert error <= tolerance.bound(tolerance.depth(start)), f"{error:.2e}"


@pytest.mark.parametrize("bend", [added_mask, no_mask, keys_are_values])
def test_nothing_is_seen_of_empty_slots(bend: Callable[[Module], None], tmp_path: Path) -> None:
    """What a device leaves in slots without a token is NaN in the emulator, and only a mask of booleans hides NaN."""
    start = prepare(build(GROUPS).module, EDGE)
    module = start.clone()
    bend(module)
    before = module_answers(module, EDGE, start)
    backend = find_backend("ai100")
    support.apply(module, backend.pipeline)
    backend.emit(module, tmp_path, options(EDGE))
    found = session_answers(backend.open(tmp_path, threads=1), EDGE)
    assert tolerance.error_over_rms(found, before) <= tolerance.bound(tolerance.depth(start))


def test_a_window_stays_right_when_its_ring_is_all_a_budget_refuses() -> None:
    """Until they are lowered, the ops of a ring are told apart by a mark that is no rewrite of its own."""
    start = prepare(build(WINDOW).module, LONG)
    module = start.clone()
    support.apply(module, "canonicalize")
    before = module_answers(module, LONG, start)
    run_pipeline(module, Pipeline.parse("kv-retention{layout=tensor-scatter}"), budgets={"kv-retention": 0})
    error = tolerance.error_over_rms(module_answers(module, LONG, start), before)
    assert error <= tolerance.bound(tolerance.depth(start)), f"{error:.2e}"


def test_keys_that_a_mask_hides_are_read_as_they_are() -> None:
    """The values behind them get zeros for empty slots; for keys that would be a pass over the cache for nothing."""
    module = prepare(build(PLAIN).module, EDGE)
    support.apply(module, "canonicalize,kv-retention")
    (node,) = nodes(module, "Attention")
    keys = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert keys is not None and keys.op_type == "CtxGather"
    assert made_by(node.inputs[2], "Where") is not None


def test_canonicalization_leaves_the_ops_of_the_dialect_and_of_the_device() -> None:
    """Their bodies are what the compiler is shown, not what is to be run."""
    module = prepare(build(WINDOW).module, LONG)
    for step, kept in (("canonicalize", "CacheUpdate"), ("kv-retention", "CtxScatter"), ("attention", "CtxGather")):
        support.apply(module, step)
        count = len(nodes(module, kept))
        support.apply(module, "canonicalize")
        assert len(nodes(module, kept)) == count == 2


def test_rings_alone_bring_no_longer_cache() -> None:
    module = prepare(build(WINDOW).module, LONG)
    support.apply(module, "canonicalize,kv-retention{layout=tensor-scatter}")
    assert "cache_len" not in module.dims
    assert not any("cache_len" in s.symbols for s in module.specializations)


def test_rings_of_two_windows_have_their_own_lengths() -> None:
    module = prepare(build(Recipe((Layer(window=4), Layer(window=2), Layer()))).module, LONG)
    support.apply(module, "canonicalize,kv-retention{layout=tensor-scatter}")
    assert [state.shape[2] for state in module.states[::2]] == ["sliding_window_4", "sliding_window_2", "cache_len"]
    for found in module.specializations:
        assert (found.symbols["sliding_window_4"], found.symbols["sliding_window_2"]) == (6, 4)


def test_gates_and_roots_of_something_else_are_no_sites() -> None:
    """What is no near miss must not be reported as one: a report of hundreds is not read."""
    module = prepare(build(PLAIN).module, EDGE)
    support.apply(module, "canonicalize")
    before = [len(FuseActivations().sites(module)), len(FuseNorms().sites(module))]

    def gate(b: OpBuilder, old: ir.Value) -> ir.Value:
        other = like(like(old, b, "Tanh"), b, "Add", b.const(2.0, np.float32))
        gated = like(like(other, b, "Sigmoid"), b, "Mul", old)
        return like(gated, b, "Mul", like(like(other, b, "Sqrt"), b, "Reciprocal"))

    replace_logits(module, gate)
    assert [len(FuseActivations().sites(module)), len(FuseNorms().sites(module))] == before == [1, 3]


def test_a_lowering_that_is_refused_leaves_the_opset() -> None:
    """A bisection stops a pass after some rewrites; what is left must still be of the opset that is declared."""
    module = prepare(build(PLAIN).module, EDGE)
    support.apply(module, DEVICE)
    before = module.model.opset_imports[""]
    rewriter = Rewriter(module, "legalize", budget=2)
    Legalize().run(module, rewriter)
    assert rewriter.refused and module.model.opset_imports[""] == before
    assert any(node.op_type == "RMSNormalization" for node in module.graph)
    assert all(node.metadata_props.get(SOURCE_KEY) is not None for node in module.graph)
