"""What the attention kernel leaves for padding must not reach the tokens: it is whatever memory happens to hold."""

from __future__ import annotations

import numpy as np
import pytest

from qeff_ir import numerics
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.rewriter import Rewriter
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import expected, module_answers, prepare
from qeff_ir.testing.recipe import Layer, Recipe
from tests.properties import LONG

PIPELINE = "canonicalize,last-logits,kv-retention{layout=tensor-scatter},attention{impl=standard},ort-attention"


def worst_memory(module: Module) -> int:
    """Make the kernel's result NaN wherever there is no token; returns how many kernels there are."""
    kernels = [node for node in module.graph if node.op_type == "GroupQueryAttention"]
    for kernel in kernels:
        mixed, positions = kernel.outputs[0], module.input("position_ids")
        readers = list(mixed.uses())
        b = Rewriter(module, "fault").at(readers[0].node)
        real = b("Unsqueeze", b("GreaterOrEqual", positions, b.const(0)), b.const([2]))
        found = b("Where", real, mixed, b.const(np.nan, np.float32), dtype=mixed.dtype)
        for use in readers:
            use.node.replace_input_with(use.idx, found)
    return len(kernels)


@pytest.mark.parametrize(
    "others",
    [
        (Layer(window=2),),
        (Layer(decomposed=True),),
        (Layer(linear="decay"),),
        (Layer(), Layer(), Layer(), Layer(window=2)),
        (Layer(),),
    ],
    ids=["ring", "decomposed", "state", "ring behind many", "none"],
)
def test_padding_of_the_kernel_reaches_no_token(others: tuple[Layer, ...]) -> None:
    recipe = Recipe((Layer(), *others), head_dim=8, value_dim=8, rotary="half")
    module = prepare(build(recipe).module, LONG)
    start = module.clone()
    run_pipeline(module, Pipeline.parse(PIPELINE))
    assert worst_memory(module) == 1 + others.count(Layer())
    error = numerics.error_over_rms(module_answers(module, LONG, start), expected(recipe, LONG))
    assert error <= numerics.bound(numerics.depth(start))


def test_projections_are_read_and_written_as_they_are() -> None:
    """No head is split off or moved around the kernel: every transposition and copy would cost time at each token."""
    recipe = Recipe((Layer(), Layer()), kv_heads=2, group=2, head_dim=16, value_dim=16, rotary="half", gemm=False)
    module = prepare(build(recipe).module, LONG)
    run_pipeline(module, Pipeline.parse(PIPELINE.replace("canonicalize", "canonicalize,fuse-rotary") + ",ort-kernels"))
    kernels = [node for node in module.graph if node.op_type == "GroupQueryAttention"]
    assert len(kernels) == 2
    # Nor is what the kernel leaves for padding taken out where no other layer keeps any of it.
    assert {user.op_type for kernel in kernels for user in kernel.outputs[0].consumers()} == {"FusedMatMul"}
    assert not [node for node in module.graph if node.op_type in ("Transpose", "Reshape")]
