"""Attention in blocks of keys, from outside: windows, rings, sinks, soft-caps and biases, on both targets."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from backends import find_backend
from qeff_ir.ir.module import SOURCE_KEY, Module
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.passing.report import Report
from qeff_ir.testing.kit import NotHeldError, hold_package, hold_pass, planted
from tests import support
from tests.examples import blocked_attention
from tests.examples.blocked_attention import BlockedAttention


def blocked(target: str, block: int) -> Pipeline:
    return Pipeline.parse(find_backend(target).pipeline).insert_after("kv-retention", BlockedAttention(block))


def fired(name: str, target: str, block: int) -> tuple[Module, Report]:
    module = support.canonical(name)
    return module, run_pipeline(module, blocked(target, block), check=2)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "bloom", "deepseek-v3"])
def test_it_answers_as_before(name: str, target: str, tmp_path: Path) -> None:
    module, report = fired(name, target, 7)
    run = next(run for run in report.runs if run.id == "blocked-attention")
    assert sum(run.stats.fired.values()) == name_layers(name) and not run.stats.missed
    support.answers_alike(module, support.canonical(name), target, tmp_path)


def name_layers(name: str) -> int:
    return sum(node.op_type in ("Attention", "SinkAttention") for node in support.canonical(name).graph)


def test_every_check_passes() -> None:
    module = support.canonical("gpt-oss")
    run_pipeline(module, blocked("ai100", 7), check=4)
    layers = Counter(node.metadata_props[SOURCE_KEY] for node in module.graph if node.op_type == "Exp")
    # Weights of the blocks, what fades before all but the first, and the sinks; of a ring, and of all of the context.
    assert set(layers.values()) == {2 + 1 + 2, 7 + 6 + 2}


def test_what_fits_one_block_is_left_to_the_stock_pass() -> None:
    _, report = fired("llama", "ai100", 48)
    run = next(run for run in report.runs if run.id == "blocked-attention")
    assert not run.stats.fired and {m.reason for m in run.stats.missed} == {"all keys are in one block"}


@pytest.mark.parametrize(
    ("lengths", "block", "count"),
    [({48}, 7, 7), ({8, 48}, 12, 4), ({48}, 48, 1), ({4, 13, 48}, 12, 4), ({3, 48}, 12, None), ({9}, 2, 5)],
)
def test_no_block_is_empty_in_any_specialization(lengths: set[int], block: int, count: int | None) -> None:
    assert blocked_attention.blocks(lengths, block) == count
    for length, parts in ((length, count) for length in lengths if count is not None):
        ends = blocked_attention.bounds(length, parts)
        sizes = [end - start for start, end in itertools.pairwise(ends)]
        assert sum(sizes) == length and all(0 < size <= block for size in sizes)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_it_holds_on_drawn_decoders(target: str) -> None:
    item = BlockedAttention(3)
    held = hold_pass(item, target=target, pipeline=blocked(target, 3), examples=25)
    assert sum(held.fired.values()) > 0
    assert hold_package(item, target=target, pipeline=blocked(target, 3), examples=12).changed > 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('b("Exp", b("Sub", scores, new))', 'b("Exp", b("Sub", scores, highest))'),
        ('b("Add", b("Mul", total, fade), sums)', 'b("Add", total, sums)'),
        ('mixed = b("Mul", mixed, fade)', "mixed = mixed"),
    ],
    ids=["top of the block", "total not faded", "sinks not faded"],
)
def test_a_sum_that_is_not_faded_is_told(old: str, new: str) -> None:
    with planted(blocked_attention._blocked, old, new), pytest.raises(NotHeldError):
        hold_pass(BlockedAttention(3), target="ai100", pipeline=blocked("ai100", 3), examples=30, shrink=False)
