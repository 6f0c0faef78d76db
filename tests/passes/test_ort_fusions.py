"""ONNX Runtime's kernels for queries, keys and values of one product, and for a residual with its norm: near misses."""

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
    "canonicalize,fuse-norms,fuse-rotary,last-logits,fuse-products,kv-retention{layout=tensor-scatter},"
    "attention{impl=standard},ort-attention,ort-rotary"
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


def norm(module: Module) -> ir.Node:
    """The norm of the first sum."""
    return next(n for n in module.graph if n.op_type == "RMSNormalization" and maker(n.inputs[0]).op_type == "Add")


def keys_for_values(module: Module) -> None:
    node = kernel(module)
    keys, values = node.inputs[1:3]
    node.replace_input_with(1, values)
    node.replace_input_with(2, keys)


def keys_read_twice(module: Module) -> None:
    node = kernel(module)
    b = Rewriter(module, "fault").at(node)
    node.replace_input_with(2, b("Add", node.inputs[2], node.inputs[1]))


def parts_of_the_batch(module: Module) -> None:
    """The same parts, with an axis that says nothing of features."""
    node = maker(kernel(module).inputs[0])
    node.attributes["axis"] = ir.AttrInt64("axis", 2)


def sum_read_first(module: Module) -> None:
    node = norm(module)
    total = maker(node.inputs[0]).outputs[0]
    b = Rewriter(module, "fault").after(maker(total))
    early = b("Relu", total)
    later = next(n for n in total.consumers() if n.op_type == "Add")
    later.replace_input_with(list(later.inputs).index(total), early)


def one_row_for_all(module: Module) -> None:
    added = maker(norm(module).inputs[0])
    b = Rewriter(module, "fault").at(added)
    added.replace_input_with(1, b("ReduceSum", added.inputs[1], b.const([1]), keepdims=1))


def norm_of_tokens(module: Module) -> None:
    """A scale that is broadcast over the features."""
    node = norm(module)
    b = Rewriter(module, "fault").at(node)
    node.replace_input_with(1, b("Slice", node.inputs[1], b.const([0]), b.const([1]), b.const([0])))


@pytest.mark.parametrize(
    ("step", "change", "reason"),
    [
        ("ort-packed-attention", nothing, None),
        ("ort-packed-attention", parts_of_the_batch, None),
        ("ort-packed-attention", keys_for_values, "are not the three parts in this order"),
        ("ort-packed-attention", keys_read_twice, "are not the three parts in this order"),
        ("ort-skip-norms", nothing, None),
        ("ort-skip-norms", sum_read_first, "something else reads the sum first"),
        ("ort-skip-norms", one_row_for_all, "the summands are not of one shape"),
        ("ort-skip-norms", norm_of_tokens, "scale or bias are not one number for each feature"),
    ],
)
def test_a_kernel_stands_for_what_it_computes_and_nothing_else(
    step: str, change: Callable[[Module], None], reason: str | None
) -> None:
    module = prepare(build(WHOLE).module, EDGE)
    start = module.clone()
    run_pipeline(module, Pipeline.parse(BEFORE))
    change(module)
    before = module_answers(module, EDGE, start)
    (run,) = run_pipeline(module, Pipeline.parse(step), check=2).runs
    assert [missed.reason for missed in run.stats.missed if reason and reason in missed.reason] or reason is None
    kernels = sum(run.stats.fired.values())
    assert kernels == ({"ort-packed-attention": 1, "ort-skip-norms": 2}[step] - (reason is not None))
    after = module_answers(module, EDGE, start)
    assert numerics.error_over_rms(after, before) <= numerics.bound(numerics.depth(start))
