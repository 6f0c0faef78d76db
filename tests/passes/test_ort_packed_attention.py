"""ONNX Runtime's attention takes queries, keys and values of one product whole: near misses."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from qeff_ir import numerics
from qeff_ir.ir.module import Module
from qeff_ir.passing import Pipeline, Rewriter, run_pipeline
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import module_answers, prepare
from qeff_ir.testing.recipe import Layer, Recipe
from tests.properties import EDGE

WHOLE = Recipe((Layer(),), head_dim=16, value_dim=16, rotary="half")
BEFORE = (
    "canonicalize,fuse-norms,fuse-rotary,last-logits,kv-retention{layout=tensor-scatter},"
    "attention{impl=standard},ort-attention,ort-rotary,fuse-products"
)


def nothing(_: Module) -> None:
    pass


def maker(value: ir.Value | None) -> ir.Node:
    """The node that computes a value."""
    node = value.producer() if value is not None else None
    assert node is not None
    return node


def kernel(module: Module) -> ir.Node:
    (found,) = (node for node in module.graph if node.op_type == "GroupQueryAttention")
    return found


def keys_for_values(module: Module) -> None:
    node = kernel(module)
    keys, values = node.inputs[1:3]
    node.replace_input_with(1, values)
    node.replace_input_with(2, keys)


def keys_read_twice(module: Module) -> None:
    node = kernel(module)
    b = Rewriter(module, "fault").at(node)
    node.replace_input_with(2, b("Add", node.inputs[2], node.inputs[1]))


def axis_from_the_front(module: Module) -> None:
    """The same parts, their axis counted from the other end."""
    node = maker(kernel(module).inputs[0])
    node.attributes["axis"] = ir.AttrInt64("axis", 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nothing, None),
        (axis_from_the_front, None),
        (keys_for_values, "are not the three parts in this order"),
        (keys_read_twice, "are not the three parts in this order"),
    ],
)
def test_a_kernel_takes_three_parts_of_one_value_and_nothing_else(
    change: Callable[[Module], None], reason: str | None
) -> None:
    module = prepare(build(WHOLE).module, EDGE)
    start = module.clone()
    run_pipeline(module, Pipeline.parse(BEFORE))
    change(module)
    before = module_answers(module, EDGE, start)
    (run,) = run_pipeline(module, Pipeline.parse("ort-packed-attention"), check=2).runs
    assert [missed.reason for missed in run.stats.missed if reason and reason in missed.reason] or reason is None
    assert run.stats.fired == ({} if reason else {"GroupQueryAttention": 1})
    after = module_answers(module, EDGE, start)
    assert numerics.error_over_rms(after, before) <= numerics.bound(numerics.depth(start))
