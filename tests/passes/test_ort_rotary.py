"""What the attention kernel does not rotate by itself: it stays as it is, with the reason, and keeps its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qeff_ir import numerics
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.rewriter import OpBuilder, Rewriter
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import module_answers, prepare
from qeff_ir.testing.recipe import Layer, Recipe
from tests import support
from tests.properties import EDGE

BEFORE = (
    "canonicalize,fuse-rotary,last-logits,kv-retention{layout=tensor-scatter},attention{impl=standard},ort-attention"
)
WHOLE = Recipe((Layer(),), head_dim=16, value_dim=16, rotary="half")
"""Just what the kernel can do."""


def rotations(module: Module) -> tuple[ir.Node, ir.Node]:
    queries, keys = [node for node in module.graph if node.op_type == "RotaryEmbedding"]
    return queries, keys


def other_angles(module: Module) -> None:
    _, keys = rotations(module)
    b, cosine = Rewriter(module, "test").at(keys), keys.inputs[1]
    assert cosine is not None
    keys.replace_input_with(1, b("Mul", cosine, b.const(0.5, np.float32), shape=cosine.shape, dtype=cosine.dtype))


def other_order(module: Module) -> None:
    rotations(module)[1].attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def neighbors(module: Module) -> None:
    """Rotations of neighboring numbers, which the kernel can do too."""
    for node in rotations(module):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def times(module: Module, factor: Callable[[OpBuilder], ir.Value]) -> None:
    """Multiply the cosines of queries and keys by the same."""
    queries, keys = rotations(module)
    b, cosine = Rewriter(module, "test").at(queries), queries.inputs[1]
    assert cosine is not None
    product = b("Mul", cosine, factor(b), shape=cosine.shape, dtype=cosine.dtype)
    for node in (queries, keys):
        node.replace_input_with(1, product)


def longest_position(module: Module) -> None:
    """As models do whose frequencies switch with the length of a run."""
    positions = module.input("position_ids")
    times(module, lambda b: b("Cast", b("ReduceMax", positions, keepdims=0), to=int(ir.DataType.FLOAT)))


def factor_of_rows(module: Module) -> None:
    """A number for each row of the batch: no table by position holds it."""
    times(module, lambda b: b.const(np.linspace(0.5, 1.5, EDGE.batch).reshape(-1, 1, 1), np.float32))


def part_of_each_head(module: Module) -> None:
    """The first half of each head is turned, by half of the angles."""
    queries, keys = rotations(module)
    b = Rewriter(module, "test").at(queries)
    for index, value in enumerate(queries.inputs[1:], start=1):
        assert value is not None and value.shape is not None
        shape = [*value.shape[:2], 4]
        half = b("Slice", value, b.const([0]), b.const([4]), b.const([2]), shape=shape, dtype=value.dtype)
        for node in (queries, keys):
            node.replace_input_with(index, half)
    for node in (queries, keys):
        node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", 8)


def nothing(module: Module) -> None:
    pass


@pytest.mark.parametrize(
    ("recipe", "change", "reason"),
    [
        (WHOLE, other_angles, "queries and keys are rotated by different angles"),
        (WHOLE, other_order, "queries and keys are rotated in different orders"),
        (WHOLE, longest_position, "cosines and sines depend on more than the position of a token"),
        (WHOLE, factor_of_rows, "cosines and sines depend on more than the position of a token"),
        (WHOLE, part_of_each_head, "only a part of each head is rotated"),
        (Recipe((Layer(),), head_dim=8, value_dim=8, rotary="half"), nothing, "no multiple of sixteen"),
        (
            Recipe((Layer(),), head_dim=16, value_dim=16, rotary="half", odd="unequal-halves"),
            nothing,
            "only queries or only keys are rotated",
        ),
        (WHOLE, nothing, None),
        (WHOLE, neighbors, None),
    ],
)
def test_what_the_kernel_cannot_do_is_left_alone(
    recipe: Recipe, change: Callable[[Module], None], reason: str | None
) -> None:
    module = prepare(build(recipe).module, EDGE)
    start = module.clone()
    run_pipeline(module, Pipeline.parse(BEFORE))
    assert any(node.op_type == "GroupQueryAttention" for node in module.graph)
    change(module)
    before = module_answers(module, EDGE, start)
    (run,) = run_pipeline(module, Pipeline.parse("ort-rotary")).runs
    assert dict(run.stats.fired) == ({} if reason else {"RotaryEmbedding": 1})
    assert [(reason or "?") in missed.reason for missed in run.stats.missed] == [True] * (reason is not None)
    after = module_answers(module, EDGE, start)
    assert numerics.error_over_rms(after, before) <= numerics.bound(numerics.depth(start))


def test_padding_is_looked_up_where_there_are_angles(tmp_path: Path) -> None:
    """The kernel does not check: at position -1 it would read what lies before its tables."""
    module = prepare(build(WHOLE).module, EDGE)
    run_pipeline(module, Pipeline.parse(f"{BEFORE},ort-rotary"))
    (kernel,) = (node for node in module.graph if node.op_type == "GroupQueryAttention")
    looked_up = kernel.inputs[9]
    assert looked_up is not None
    feeds = support.random_feeds(module, {"batch_size": 2, "seq_len": 3, "cache_len": 9, "ctx_len": 9})
    feeds["input_ids"] %= 4
    assert feeds["position_ids"].min() == -1
    module.graph.outputs.append(looked_up)
    found = support.run_graph(module, tmp_path, feeds)[looked_up.name or ""]
    np.testing.assert_array_equal(found, np.maximum(feeds["position_ids"], 0))
