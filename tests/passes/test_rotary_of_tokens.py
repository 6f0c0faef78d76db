"""Encoders rotate ``[tokens, heads, width]``: fused where that is the standard rotation, and left alone elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qeff_ir.frontend.checkpoint.weights import memory_weights
from qeff_ir.frontend.export.encoders import lower_encoder
from qeff_ir.ir.module import Module
from qeff_ir.numerics import bound, depth, error_over_rms
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.matching import made_by
from tests import multimodal, support

NAME, LAYERS = "qwen2_5_vl", 2


@functools.cache
def _encoder() -> Module:
    model = multimodal.build(NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.weight"):  # of the encoder alone: its tokens look at few others
                parameter.mul_(30)
    module = lower_encoder(model, memory_weights(model), multimodal.picture(NAME))
    support.apply(module, support.CANONICAL)
    return module


def answer(module: Module, folder: Path) -> np.ndarray[Any, Any]:
    feeds = {str(v.name): multimodal.picture(NAME, seed=9)[str(v.name)].numpy() for v in module.graph.inputs}
    return support.run_graph(module, folder, feeds)["vision_embeds"]


def sums(module: Module) -> list[ir.Node]:
    """What adds a rotated part to a plain one."""
    swapped = [n for n in module.graph if n.op_type == "Concat" and made_by(n.inputs[0], "Neg") is not None]
    return [total for n in swapped for times in n.outputs[0].consumers() for total in times.outputs[0].consumers()]


def rotations(module: Module) -> int:
    return sum(node.op_type == "RotaryEmbedding" for node in module.graph)


def cosine(module: Module) -> ir.Value:
    """That of all layers, ``[tokens, 1, width]``."""
    plain = made_by(sums(module)[0].inputs[0], "Mul")
    assert plain is not None and plain.inputs[1] is not None and plain.inputs[1].const_value is not None
    return plain.inputs[1]


def computed(module: Module, last: Callable[[OpBuilder, ir.Value], ir.Value] | None = None) -> None:
    """Let the cosine be computed as that of large pictures is: of frequencies that are twice in each row."""
    value = cosine(module)
    table: Any = value.const_value
    uses, half = list(value.uses()), table.numpy()[:, 0, : table.shape[-1] // 2]
    b = Rewriter(module, "test").at(module.graph[0])
    rows, width = half.shape[0], 2 * half.shape[1]
    turned = b("Identity", b.const(half[::-1].tolist(), np.float32), shape=[rows, width // 2], dtype=table.dtype)
    both = b("Concat", turned, turned, axis=-1, shape=[rows, width])
    if last is not None:
        both = last(b, both)
    back = b("Gather", both, b.const([*range(rows - 1, -1, -1)]), axis=0, shape=[rows, width])
    made = b("Unsqueeze", back, b.const([1]), shape=[rows, 1, width])
    for use in uses:
        use.node.replace_input_with(use.idx, made)


def other_half(module: Module) -> None:
    """A table whose two halves are not equal."""
    value = cosine(module)
    table: Any = value.const_value
    numbers = table.numpy().copy()
    numbers[..., -1] *= 0.5
    other = Rewriter(module, "test").constant(numbers)
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, other)


def other_columns(module: Module) -> None:
    """Columns of a table of two equal halves are put in another order."""

    def moved(b: OpBuilder, table: ir.Value) -> ir.Value:
        assert table.shape is not None
        order = [1, 0, *range(2, int(str(table.shape[1])))]
        return b("Gather", table, b.const(order), axis=1, shape=table.shape)

    computed(module, moved)


def kept(module: Module) -> None:
    """A rotated value is returned too."""
    module.graph.outputs.append(sums(module)[0].outputs[0])


def read_twice(module: Module) -> None:
    """A rotated value goes elsewhere too, as it is."""
    total = sums(module)[0].outputs[0]
    b = Rewriter(module, "test").at(next(iter(total.consumers())))
    module.graph.outputs.append(b("Abs", total, shape=total.shape, dtype=total.dtype))


def test_queries_and_keys_of_all_layers_are_rotated_by_the_operator(tmp_path: Path) -> None:
    module, plain = _encoder().clone(), _encoder().clone()
    assert len(sums(module)) == 2 * LAYERS and rotations(module) == 0
    nodes = len(module.graph)
    support.apply(module, "fuse-rotary")
    assert rotations(module) == 2 * LAYERS and not sums(module)
    assert len(module.graph) <= nodes - 6 * 2 * LAYERS + 4  # one node for seven
    found, right = answer(module, tmp_path / "fused"), answer(plain, tmp_path / "plain")
    assert error_over_rms(found, right) <= bound(depth(module, "vision_embeds"))


def test_tables_that_are_computed_are_known_by_how_they_are_made(tmp_path: Path) -> None:
    module = _encoder().clone()
    computed(module)
    support.apply(module, "fuse-rotary")
    assert rotations(module) == 2 * LAYERS
    found, right = answer(module, tmp_path / "fused"), answer(_encoder().clone(), tmp_path / "plain")
    assert error_over_rms(found, right) <= bound(depth(module, "vision_embeds"))


@pytest.mark.parametrize(
    ("bend", "left"), [(other_half, 2 * LAYERS), (other_columns, 2 * LAYERS), (kept, 1), (read_twice, 1)]
)
def test_what_is_no_rotation_is_left_alone(bend: Callable[[Module], None], left: int, tmp_path: Path) -> None:
    bent = _encoder().clone()
    before = answer(bent.clone(), tmp_path / "whole")
    bend(bent)
    after = bent.clone()
    report = support.apply(after, "fuse-rotary")
    assert rotations(after) == 2 * LAYERS - left and len(report.runs[0].stats.missed) == left
    right, found = answer(bent, tmp_path / "bent"), answer(after, tmp_path / "fused")
    assert error_over_rms(found, right) <= bound(depth(after, "vision_embeds"))
    changes = error_over_rms(before, right) > 100 * bound(depth(after, "vision_embeds"))
    assert changes == (bend not in (kept, read_twice))
