"""Bends of rotations: of the halves of a head, and of the angles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from backends.onnxruntime.passes._rows import size
from qeff_ir.ir.module import Module
from qeff_ir.passing.matching import made_by
from tests.properties import LONG

from .editing import at, like, nodes, set_constant, set_int, wrap


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


def turned_backwards(module: Module) -> None:
    """The turned part is taken off, not added: a rotation by the negative angle."""
    concat, _, _ = turned_halves(module)
    (sines,) = concat.outputs[0].consumers()
    (total,) = sines.outputs[0].consumers()
    assert total.inputs[1] is sines.outputs[0]
    total.op_type = "Sub"


def sine_added(module: Module) -> None:
    """The turned part plus the sines, not times them: no rotation."""
    concat, _, _ = turned_halves(module)
    (sines,) = concat.outputs[0].consumers()
    sines.op_type = "Add"


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


def tokens_before_heads(module: Module) -> None:
    """A rotation of ``[batch, seq, heads, width]``: cosines and sines have their axis of heads behind the tokens."""
    concat, high, low = turned_halves(module)
    (sines,) = concat.outputs[0].consumers()
    (total,) = sines.outputs[0].consumers()
    plain = made_by(next(v for v in total.inputs if v is not sines.outputs[0]), "Mul")
    negation, x = made_by(concat.inputs[0], "Neg"), low.inputs[0]
    assert plain is not None and negation is not None and x is not None and x.shape is not None
    swapped = at(low)("Transpose", x, perm=[0, 2, 1, 3], shape=[x.shape[i] for i in (0, 2, 1, 3)], dtype=x.dtype)
    for node in (low, high, plain):
        node.replace_input_with(list(node.inputs).index(x), swapped)
    for node in (plain, sines):
        (angles,) = (n for v in node.inputs if (n := made_by(v, "Unsqueeze")) is not None)
        full = angles.inputs[0]
        assert full is not None and full.shape is not None
        rows, tokens, width = full.shape.dims
        wide = at(node)("Unsqueeze", full, at(node).const([2]), shape=[rows, tokens, 1, width], dtype=full.dtype)
        node.replace_input_with(list(node.inputs).index(angles.outputs[0]), wide)
    for out in (node.outputs[0] for node in (low, high, negation, concat, plain, sines, total)):
        assert out.shape is not None
        out.shape = ir.Shape([out.shape[i] for i in (0, 2, 1, 3)])
    uses = list(total.outputs[0].uses())
    end = uses[0].node
    back = at(end)("Transpose", total.outputs[0], perm=[0, 2, 1, 3], shape=x.shape, dtype=x.dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, back)


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
    shape = [1, *angles.shape.dims[1:]]
    first = b("Slice", angles, b.const([0]), b.const([1]), b.const([0]), shape=shape, dtype=angles.dtype)
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


def angles_of_the_tokens(module: Module) -> None:
    """A token is turned by what it is too, not by its position alone."""
    (cosines,) = nodes(module, "Cos")
    angles, b = cosines.inputs[0], at(cosines)
    assert angles is not None
    own = b("Cast", b("Unsqueeze", module.input("input_ids"), b.const([2])), to=ir.DataType.FLOAT)
    turned = b("Add", angles, b("Mul", own, b.const(0.3, np.float32)), shape=angles.shape, dtype=angles.dtype)
    for use in [use for use in angles.uses() if use.node.op_type in ("Cos", "Sin")]:
        use.node.replace_input_with(use.idx, turned)


def other_sines(module: Module) -> None:
    _, keys = nodes(module, "RotaryEmbedding")
    wrap(keys, 2, "Mul", 0.5)


def scaled_angles(module: Module) -> None:
    """Cosines and sines of both by one number, as long contexts have them: still in the kernel's power."""
    queries, keys = nodes(module, "RotaryEmbedding")
    b = at(queries)
    for index in (1, 2):
        scaled = like(queries.inputs[index], b, "Mul", b.const(0.7, np.float32))
        for node in (queries, keys):
            node.replace_input_with(index, scaled)


def cosines_summed(module: Module) -> None:
    """Each token's cosines and those of all tokens before it in the run."""
    queries, keys = nodes(module, "RotaryEmbedding")
    b = at(queries)
    summed = like(queries.inputs[1], b, "CumSum", b.const(1))
    for node in (queries, keys):
        node.replace_input_with(1, summed)


def fourth_input(module: Module) -> None:
    """Positions for the rotation to look up its own angles by."""
    queries = nodes(module, "RotaryEmbedding")[0]
    queries.resize_inputs(4)
    queries.replace_input_with(3, module.input("position_ids"))
