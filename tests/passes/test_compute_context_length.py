"""Caches that are read in part: each run takes the shortest length that it fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import find_backend
from passes.compute_context_length import ComputeContextLength
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import Run
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.runs import fitted
from qeff_ir.testing.kit import NotHeldError, hold_package, hold_pass, planted
from tests import support

LENGTHS = ComputeContextLength(prefill="16,48", decode="12,24,100")
"""The last becomes the context."""


def short(item: ComputeContextLength = LENGTHS, target: str = "ai100") -> Pipeline:
    backend = find_backend(target)
    return Pipeline.parse(backend.pipeline).insert_after(backend.lengths_behind, item)


def opened(name: str, folder: Path, target: str = "ai100", *, check: int = 2) -> tuple[Module, Decoder]:
    module, backend = support.canonical(name), find_backend(target)
    run_pipeline(module, short(target=target), check=check)
    backend.check(module, support.OPTIONS)
    backend.emit(module, folder, support.OPTIONS)
    return module, Decoder(backend.open(folder, threads=1))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "ai100") for name in ("llama", "gemma3", "gpt-oss", "bloom", "qwen3-next")),
        *((name, "onnxruntime") for name in ("bloom", "gpt-oss")),
    ],
)
def test_it_answers_as_transformers_over_every_length(name: str, target: str, tmp_path: Path) -> None:
    module, own = opened(name, tmp_path, target)
    assert [(s.phase, s.symbols["comp_ctx_lengths"]) for s in module.specializations] == [
        ("prefill", 16), ("prefill", 48), ("decode", 12), ("decode", 24), ("decode", 48),
    ]  # fmt: skip
    rows = np.random.default_rng(1).integers(1, 97, (2, 47)).tolist()
    expected = [[support.forward(name, row[: i + 1]) for i in range(len(row))] for row in rows]
    np.testing.assert_allclose(own.prefill([rows[0][:10], rows[1][:5]]), [expected[0][9], expected[1][4]], atol=1e-4)
    found = np.zeros(0)
    for step in range(37):
        found = own.decode([rows[0][10 + step], rows[1][5 + step]])
        np.testing.assert_allclose(found, [expected[0][10 + step], expected[1][5 + step]], atol=1e-4)
    assert np.ptp(found) > 1e-2


@pytest.mark.parametrize(
    ("last", "columns", "length"), [(7, 8, 16), (16, 8, 48), (11, 1, 12), (12, 1, 24), (47, 1, 48)]
)
def test_a_run_takes_the_shortest_length_that_it_fits(last: int, columns: int, length: int, tmp_path: Path) -> None:
    session = opened("llama", tmp_path)[1].session
    positions = np.tile(np.arange(last - columns + 1, last + 1), (2, 1))
    given = fitted(Run(np.zeros_like(positions), positions), session.interface.inputs, session.specializations)
    fed = {port.name: port.feed(given) for port in session.interface.inputs}
    assert given.sizes["comp_ctx_lengths"] == length and fed["comp_ctx_lengths"].tolist() == [0] * length


def test_rings_are_read_whole() -> None:
    module = support.canonical("mistral")
    run_pipeline(module, short())
    assert all(state.ring for state in module.states)
    assert [v.name for v in module.graph.inputs][:2] == ["input_ids", "position_ids"]
    assert not any("comp_ctx_lengths" in s.symbols for s in module.specializations)


def test_every_check_drives_the_lengths() -> None:
    module = support.canonical("gemma3")
    run_pipeline(module, short(), check=4)
    assert "comp_ctx_lengths" in {v.name for v in module.graph.inputs}


def test_a_kernel_that_reads_what_is_there_needs_no_lengths() -> None:
    module = support.canonical("llama")
    run_pipeline(module, short(target="onnxruntime"))
    assert {node.op_type for node in module.graph} >= {"GroupQueryAttention"}
    assert not any("comp_ctx_lengths" in s.symbols for s in module.specializations)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_it_holds_on_drawn_decoders(target: str) -> None:
    item = ComputeContextLength(prefill="5,99", decode="3,8,99")
    assert hold_pass(item, target=target, pipeline=short(item, target), examples=12).changed > 0
    assert hold_package(item, target=target, pipeline=short(item, target), examples=8).changed > 0


def test_a_slot_that_is_not_read_is_told() -> None:
    """The last slot of each length is needed by one run."""
    item, old = ComputeContextLength(prefill="5,99", decode="3,8,99"), "s.symbols.get(n, 0) >= least"
    with planted(fitted, old, f"{old} - (n == 'comp_ctx_lengths')"), pytest.raises(NotHeldError):
        hold_package(item, target="ai100", pipeline=short(item), examples=15, shrink=False)
