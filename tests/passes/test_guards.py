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
from backends.ai100.passes.legalize import Legalize
from passes.fuse_activations import FuseActivations
from passes.fuse_norms import FuseNorms
from qeff_ir import numerics
from qeff_ir.errors import PassError
from qeff_ir.ir.module import SOURCE_KEY, Module
from qeff_ir.passing.base import OpBuilder, Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.matching import made_by
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import module_answers, options, prepare, session_answers
from qeff_ir.testing.recipe import Layer, Recipe
from qeff_ir.testing.strategies import Request, Run
from tests import support
from tests.passes.bends import attention, linear, rotary, tokenwise
from tests.passes.bends.editing import attribute, like, no_attribute, nodes, replace_logits
from tests.properties import EDGE, FULL, LONG

PLAIN = Recipe((Layer(),), head_dim=16, value_dim=16, rotary="half", gemm=True, bias=True)
"""What every pass finds something in."""

STATES = "canonicalize,fuse-rotary,last-logits,kv-retention{layout=tensor-scatter},attention{impl=standard}"
DEVICE = "canonicalize,fuse-norms,fuse-rotary,fuse-activations,last-logits,kv-retention,attention"


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
HEADS = Recipe((Layer(),), kv_heads=3)
ONE_GROUP = Recipe((Layer(),), group=2, head_dim=16, value_dim=16)
THIRDS = Recipe((Layer(),), head_dim=24, value_dim=24, rotary="half")
WINDOW = Recipe((Layer(window=3),))
SCALED = Recipe((Layer(),), head_dim=16, value_dim=16, scale=0.4, softcap=2.0)
ERF = Recipe((Layer(),), activation="gelu")
TANH = Recipe((Layer(),), activation="gelu-tanh")

EVEN = Request(8, 3, tuple(Run(n, (n,) * 3, (False,) * 3) for n in (3, 3, 1)), 11)
"""No row has padding."""

BENDS = {
    "gemm alpha": Bend("canonicalize", "unflatten", linear.gemm_factor("alpha")),
    "gemm beta": Bend("canonicalize", "unflatten", linear.gemm_factor("beta")),
    "gemm transposed": Bend("canonicalize", "unflatten", linear.transposed_gemm, recipe=SQUARE),
    "rows swapped": Bend("canonicalize", "unflatten", linear.other_rows, recipe=SQUARE),
    "features split": Bend("canonicalize", "unflatten", linear.split_features, recipe=SQUARE),
    "halves behind": Bend("canonicalize", "unflatten", linear.halves_behind, recipe=SQUARE),
    "lower half shifted": Bend("canonicalize", "fuse-rotary", rotary.shifted_low),
    "upper half shifted": Bend("canonicalize", "fuse-rotary", rotary.shifted_high),
    "halves of two values": Bend("canonicalize", "fuse-rotary", rotary.high_of_another),
    "cosines scaled": Bend("canonicalize", "fuse-rotary", rotary.factor_of("Cos"), less=0),
    "sines scaled": Bend("canonicalize", "fuse-rotary", rotary.factor_of("Sin"), less=0),
    "turned backwards": Bend("canonicalize", "fuse-rotary", rotary.turned_backwards),
    "sine added": Bend("canonicalize", "fuse-rotary", rotary.sine_added),
    "plain part of another": Bend("canonicalize", "fuse-rotary", rotary.plain_part_of_another),
    "tokens before heads": Bend("canonicalize", "fuse-rotary", rotary.tokens_before_heads),
    "angles of their own": Bend("canonicalize", "fuse-rotary", rotary.factor_of_each_angle, less=2),
    "angles of the first row": Bend("canonicalize", "fuse-rotary", rotary.angles_of_the_first_row, less=0),
    "angles in three parts": Bend("canonicalize", "fuse-rotary", rotary.angles_in_three_parts, less=2, recipe=THIRDS),
    "tiny sum": Bend("canonicalize", "canonicalize", tokenwise.tiny_sum, less=0),
    **{
        f"tanh number {index}": Bend(
            "canonicalize", "fuse-activations", tokenwise.tanh_constant(index, number), recipe=TANH
        )
        for index, number in enumerate([0.0449, 0.8, 2.0, 0.51])
    },
    "gelu without its half": Bend("canonicalize", "fuse-activations", tokenwise.gelu_without_half, recipe=ERF),
    "gelu of another root": Bend("canonicalize", "fuse-activations", tokenwise.other_root, recipe=ERF),
    "norm of a gate": Bend("canonicalize", "fuse-norms", tokenwise.norm_of_a_gate),
    "norm of a number": Bend("canonicalize", "fuse-norms", tokenwise.norm_of_a_number),
    "mean over tokens": Bend("canonicalize", "fuse-norms", tokenwise.mean_over_tokens),
    "bias of each head": Bend("canonicalize", "attention", attention.bias_of_each_head, less=0, recipe=GROUPS),
    "bias of each head, no groups": Bend(
        "canonicalize", "attention", attention.bias_of_each_head, less=0, recipe=HEADS
    ),
    **{
        f"mask of {4 - len(axes)} axes": Bend(
            "canonicalize", "attention", attention.mask_of_the_first_row(axes), less=0, recipe=GROUPS, request=EVEN
        )
        for axes in ([0], [0, 1])
    },
    "no mask": Bend("canonicalize", "attention", attention.no_mask, less=0, recipe=GROUPS),
    "no mask, in slots": Bend("canonicalize", "kv-retention", attention.no_mask, less=0, recipe=GROUPS),
    "no mask, in a window": Bend(
        "canonicalize", "kv-retention", attention.no_mask, less=0, recipe=WINDOW, request=FULL
    ),
    "no mask, for the kernel": Bend(STATES, "ort-attention", attention.no_mask),
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
    "past of its own": Bend(
        "canonicalize", "attention", attention.past_of_its_own, refused="counts tokens or keeps a cache"
    ),
    "causal by itself, for the kernel": Bend(STATES, "ort-attention", attribute("Attention", "is_causal", 1)),
    "values of the last slot": Bend(
        "canonicalize",
        "kv-retention{layout=tensor-scatter}",
        attention.values_of_the_last_slot,
        less=0,
        recipe=WINDOW,
        request=LONG,
    ),
    "mask of two caches": Bend(
        "canonicalize",
        "kv-retention{layout=tensor-scatter}",
        attention.mask_of_two_caches,
        less=0,
        recipe=Recipe((Layer(), Layer(window=3))),
        request=LONG,
    ),
    "softmax over tokens": Bend(
        "canonicalize,unflatten", "last-logits", tokenwise.softmax_over_tokens, refused="not a matrix product"
    ),
    "logits of two": Bend(
        "canonicalize,unflatten", "last-logits", tokenwise.sum_with_other_tokens, refused="not a matrix product"
    ),
    "logits of tokens turned": Bend(
        "canonicalize,unflatten", "last-logits", tokenwise.sum_with_turned_tokens, refused="not a matrix product"
    ),
    "turned twice": Bend(STATES, "ort-attention", attention.turned_twice, less=0, recipe=ONE_GROUP),
    "heads as tokens": Bend(STATES, "ort-attention", attention.heads_as_tokens, less=0, recipe=ONE_GROUP),
    "features before heads": Bend(STATES, "ort-attention", attention.features_before_heads, less=0, recipe=ONE_GROUP),
    "softmax of each head": Bend(STATES, "ort-attention", attention.softmax_of_each_head, less=0, recipe=ONE_GROUP),
    "heads joined by a weight": Bend(
        STATES, "ort-attention", attention.heads_joined_by_a_weight, less=0, recipe=ONE_GROUP
    ),
    "neighbors turned, in attention": Bend(STATES, "ort-attention", rotary.neighbors_turned, less=0),
    "angles from a table": Bend(STATES, "ort-attention", rotary.angles_from_a_table, less=0),
    "angles from a table, in the kernel": Bend(ROTARY, "ort-rotary", rotary.angles_from_a_table),
    "positions moved": Bend(STATES, "ort-attention", attention.later_positions),
    "slots from one": Bend(STATES, "ort-attention", attention.slot_numbers(0, 1)),
    "slots in steps": Bend(STATES, "ort-attention", attention.slot_numbers(2, 2)),
    "values elsewhere": Bend(STATES, "ort-attention", attention.other_slots_for_values),
    "keys for values": Bend(STATES, "ort-attention", attention.keys_are_values),
    "second reader": Bend(STATES, "ort-attention", attention.second_reader),
    "sines of keys": Bend(ROTARY, "ort-rotary", rotary.other_sines),
    "angles of the tokens": Bend(ROTARY, "ort-rotary", rotary.angles_of_the_tokens),
    "angles scaled": Bend(ROTARY, "ort-rotary", rotary.scaled_angles, less=0),
    "cosines summed": Bend(ROTARY, "ort-rotary", rotary.cosines_summed),
    "stacked weight": Bend("canonicalize,unflatten", "ort-kernels", linear.stacked_weight, less=0),
    "turned weight with bias": Bend("canonicalize", "ort-kernels", linear.turned_weight_with_bias, less=0),
    "swish factor": Bend("canonicalize,fuse-activations", "ort-kernels", tokenwise.swish_factor, less=0),
    "swish factor, lowered": Bend(DEVICE, "legalize", tokenwise.swish_factor, less=0),
    "swish without factor": Bend(
        "canonicalize,fuse-activations", "ort-kernels", no_attribute("Swish", "alpha"), less=0
    ),
    "swish without factor, lowered": Bend(DEVICE, "legalize", no_attribute("Swish", "alpha"), less=0),
    "gelu said to be exact": Bend(DEVICE, "legalize", tokenwise.said_to_be_exact, less=0, recipe=ERF),
    "large integers": Bend("canonicalize", "fp16-clip", tokenwise.large_integers, less=0),
    "norm without epsilon": Bend(DEVICE, "legalize", tokenwise.norm_without_epsilon, less=0),
    "small epsilon": Bend(DEVICE, "legalize", tokenwise.small_epsilon, less=0),
    "norm axis": Bend(DEVICE, "legalize", attribute("RMSNormalization", "axis", 1), refused="no attribute 'axis'"),
    "neighbors turned": Bend(
        DEVICE, "legalize", attribute("RotaryEmbedding", "interleaved", 1), refused="no attribute 'interleaved'"
    ),
    "angles looked up": Bend(DEVICE, "legalize", rotary.fourth_input, refused="takes 3 inputs, not 4"),
    "cast unbounded": Bend(DEVICE, "legalize", tokenwise.saturating(0), refused="attribute 'saturate' of Cast"),
    "cast bounded": Bend(DEVICE, "legalize", tokenwise.saturating(1), less=0),
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
    error = numerics.error_over_rms(module_answers(module, bend.request, start), before)
    assert error <= numerics.bound(numerics.depth(start)), f"{error:.2e}"


@pytest.mark.parametrize("bend", [attention.added_mask, attention.no_mask, attention.keys_are_values])
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
    assert numerics.error_over_rms(found, before) <= numerics.bound(numerics.depth(start))


def test_a_window_stays_right_when_its_ring_is_all_a_budget_refuses() -> None:
    """Until they are lowered, the ops of a ring are told apart by a mark that is no rewrite of its own."""
    start = prepare(build(WINDOW).module, LONG)
    module = start.clone()
    support.apply(module, "canonicalize")
    before = module_answers(module, LONG, start)
    run_pipeline(module, Pipeline.parse("kv-retention{layout=tensor-scatter}"), budgets={"kv-retention": 0})
    error = numerics.error_over_rms(module_answers(module, LONG, start), before)
    assert error <= numerics.bound(numerics.depth(start)), f"{error:.2e}"


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


def test_the_ring_of_the_only_window_has_the_name_of_the_contract() -> None:
    """Beside caches that keep every token, too: packages are configured by this name (AI 100 contract §1.1)."""
    module = prepare(build(Recipe((Layer(window=4), Layer()))).module, LONG)
    support.apply(module, "canonicalize,kv-retention")
    assert [state.shape[2] for state in module.states[::2]] == ["sliding_window", "ctx_len"]
    assert [found.symbols["sliding_window"] for found in module.specializations] == [6, 6]


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


@pytest.mark.parametrize(
    ("opset", "kept"),
    [
        (18, set()),
        (20, {"Gelu"}),
        (23, {"Gelu", "RMSNormalization", "RotaryEmbedding"}),
        (24, {"Gelu", "RMSNormalization", "RotaryEmbedding", "Swish"}),
    ],
)
def test_operators_that_the_opset_has_are_not_lowered(opset: int, kept: set[str]) -> None:
    module = prepare(build(PLAIN).module, EDGE)
    support.apply(module, DEVICE)
    replace_logits(module, lambda b, old: like(old, b, "Gelu"))
    support.apply(module, f"legalize{{opset={opset}}}")
    assert module.model.opset_imports[""] == opset
    newer = {"Gelu", "RMSNormalization", "RotaryEmbedding", "Swish"}
    assert {node.op_type for node in module.graph} & newer == kept


def test_a_newer_opset_is_declared_too() -> None:
    """What is legal in an opset is legal in a newer one, and a runtime asks for the one that is declared."""
    start = prepare(build(PLAIN).module, EDGE)
    module = start.clone()
    support.apply(module, f"{DEVICE},legalize")
    before = module_answers(module, EDGE, start)
    support.apply(module, "legalize{opset=20}")
    assert module.model.opset_imports[""] == 20
    np.testing.assert_array_equal(module_answers(module, EDGE, start), before)


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
