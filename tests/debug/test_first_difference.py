"""The first value that differs: where a fault was made, in the first run that shows it, and never at padding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qeff_ir.debug.drive import driven, make_plan
from qeff_ir.debug.equivalence import nudged
from qeff_ir.debug.first_difference import first_difference
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import POSITIONS
from qeff_ir.passing import Pipeline, Rewriter, run_pipeline
from tests import support

from .test_bisect import FUSIONS
from .wrong_passes import FAULT, FlippedSign, residuals


def fused() -> Module:
    """A decoder whose only sums of hidden states are its residuals."""
    module = support.canonical("llama")
    run_pipeline(module, Pipeline.parse(FUSIONS))
    return module


def doubled(module: Module, comparison: str, position: int) -> tuple[Module, ir.Value]:
    """A copy that doubles the third residual at some positions, and the value that is doubled."""
    copy = module.clone()
    node = residuals(copy)[FAULT - 1]
    rewriter = Rewriter(copy, "doubles")
    b, after = rewriter.at(node), rewriter.after(node)
    where = b("Unsqueeze", b(comparison, copy.port(POSITIONS), b.const(position)), b.const([-1]))
    factor = b("Where", where, b.const(2.0, np.float32), b.const(1.0, np.float32))
    old = node.outputs[0]
    users = [(use.node, use.idx) for use in old.uses()]
    new = after("Mul", old, factor)
    for user, index in users:
        user.replace_input_with(index, new)
    return copy, old


def test_the_value_that_takes_the_place_of_another_is_named() -> None:
    before = fused()
    after, third = before.clone(), residuals(before)[FAULT - 1].outputs[0]
    run_pipeline(after, Pipeline((FlippedSign(),)))
    found = first_difference(before, after)
    assert found is not None
    assert (found.was, found.op, found.source, found.made_by, found.run) == (
        third.name,
        "Sub",
        "model.layers.1",
        "flipped-sign",
        0,
    )
    assert found.error > 0.1 > 1e-4 > found.limit > 0
    assert str(found).startswith(
        f"%{found.name} (Sub of model.layers.1, made by flipped-sign) differs first from %{found.was}: in run 0 by "
    )


def test_the_first_run_that_shows_it_is_named() -> None:
    before = fused()
    steps = list(driven(before, make_plan(before)))
    late = next(i for i, s in enumerate(steps) if s.run is not None and s.run.positions.max() >= 13)
    assert late > 0
    after, value = doubled(before, "GreaterOrEqual", 13)
    found = first_difference(before, after)
    assert found is not None
    assert (found.was, found.op, found.run) == (value.name, "Mul", late)


def test_padding_and_rounding_are_no_difference() -> None:
    before = fused()
    padded = [s.run is not None and (s.run.positions < 0).any() for s in driven(before, make_plan(before))]
    assert any(padded)
    assert first_difference(before, doubled(before, "Less", 0)[0]) is None
    assert first_difference(before, doubled(before, "Less", 1)[0]) is not None
    assert first_difference(before, nudged(before, 5)) is None


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_what_a_target_does_to_a_right_module_is_no_difference(target: str) -> None:
    """Rings, spare slots, fused kernels: most values go, and the others are what they were."""
    before = support.canonical("gemma3")
    after = before.clone()
    run_pipeline(after, Pipeline.parse(support.rest_of(target)))
    assert first_difference(before, after) is None
