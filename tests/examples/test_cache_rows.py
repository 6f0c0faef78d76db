"""An input that a pass of another distribution adds reaches the session and the runner without an edit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import find_backend
from qeff_ir.arrays import Array
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import LOGITS, Run, name_of
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.session import Session
from tests import support
from tests.examples.cache_rows import CacheRows

NAMES = ["llama", "mistral", "qwen3-next"]


def opened(name: str, folder: Path, *, check: int = 1) -> tuple[Module, Session]:
    module, backend = support.canonical(name), find_backend("onnxruntime")
    steps = Pipeline.parse(support.rest_of("onnxruntime")).insert_after("kv-retention", CacheRows(rows=3))
    run_pipeline(module, steps, check=check)
    backend.emit(module, folder, support.OPTIONS)
    return module, backend.open(folder, threads=1)


def step(session: Session, tokens: list[list[int]], positions: list[list[int]], rows: list[int]) -> Array:
    run = Run(np.array(tokens), np.array(positions), cache_rows=np.array(rows))
    return session.run({port.name: port.feed(run) for port in session.interface.inputs})[name_of(LOGITS)][:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_every_row_goes_on_from_the_caches_that_it_names(name: str, tmp_path: Path) -> None:
    """A run of other rows in between, and another order, change nothing."""
    plain = support.open_decoder(support.canonical(name), tmp_path / "plain")
    first = plain.prefill([[5, 6, 7], [8, 9]])
    then = plain.decode([11, 12])
    module, session = opened(name, tmp_path / "rows")
    assert {s.shape[0] for s in module.states} == {"full_batch_size"}
    pad = [0] * 5
    prompts = [[5, 6, 7, *pad], [8, 9, 0, *pad]]
    positions = [[0, 1, 2, *([-1] * 5)], [0, 1, -1, *([-1] * 5)]]
    np.testing.assert_allclose(step(session, prompts, positions, [2, 0]), first, atol=1e-5)
    step(session, [[50] * 8, [0] * 8], [list(range(8)), [-1] * 8], [1, 0])  # a newcomer, beside an idle row
    turned = step(session, [[12], [11]], [[2], [3]], [0, 2])
    np.testing.assert_allclose(turned[::-1], then, atol=1e-5)
    assert np.abs(step(session, [[12], [11]], [[2], [3]], [2, 0])[::-1] - then).max() > 1e-3  # the wrong caches


def test_a_decoder_that_knows_of_no_rows_uses_its_own(tmp_path: Path) -> None:
    plain = support.open_decoder(support.canonical("llama"), tmp_path / "plain").prefill(support.PROMPTS)
    _, session = opened("llama", tmp_path / "rows", check=4)
    np.testing.assert_allclose(Decoder(session).prefill(support.PROMPTS), plain, atol=1e-5)
