"""Requests that come and go in the rows of one package: each answers as transformers does for it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir.arrays import Array
from qeff_ir.compiler import Compiled, compile_model
from qeff_ir.cost import cost
from qeff_ir.debug.drive import drive, make_plan
from qeff_ir.errors import CompileError, RuntimeInputError
from qeff_ir.ir.ports import CACHE_ROW, CACHE_ROWS, Run
from qeff_ir.numerics import error_over_rms
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.runs import logits_of
from qeff_ir.runtime.session import Session
from qeff_ir.specialize import specialize
from tests import support
from tests.models import WINDOW

TARGETS = ["onnxruntime", "ai100"]
# A row for each mechanism: caches of all tokens; rings; a recurrence. Compressed caches, shared ones, an indexer and
# other recurrences come at night.
NAMES = ["llama", "mistral", "qwen3-next"]
MORE = ["gemma3", "deepseek-v3", "mamba", "falcon-h1", "gemma3n", "deepseek-v32", "inkling"]
CHUNK = 8
LIMIT = 2e-4


def packaged(name: str, target: str, out: Path, pipeline: str | None = None, **options: Any) -> Compiled:
    given = {"prefill_seq_len": CHUNK, "ctx_len": 48, "full_batch_size": 3, "kv_cache_batch_size": 4, **options}
    source = support.Lowered(name)
    return compile_model(source, given, target=target, out=out, pipeline=pipeline, emit_only=target == "ai100")


class Slots:
    """Requests in rows of the caches; what a run answers is compared at once."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name = session, name
        self.rows: dict[int, list[int]] = {}
        self.compared = 0

    def prefill(self, row: int, tokens: list[int], *, more: bool = False) -> None:
        """Read a chunk of a prompt into a row, from the beginning unless there is `more` of it."""
        seen = self.rows.get(row, []) if more else []
        positions = np.arange(len(seen), len(seen) + len(tokens))
        self.rows[row] = [*seen, *tokens]
        found = logits_of(self.session, Run(np.array([tokens]), positions[None], cache_rows=np.array([row])))
        self._compare(row, found[0, -1])

    def decode(self, rows: list[int], tokens: list[int]) -> None:
        """A token for some rows, in any order; -1 idles."""
        positions = [[len(self.rows[row])] if row >= 0 else [-1] for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            if row >= 0:
                self.rows[row] = [*self.rows[row], token]
        given = Run(np.array(tokens)[:, None], np.array(positions), cache_rows=np.array(rows))
        found = logits_of(self.session, given)
        for place, row in enumerate(rows):
            if row >= 0:
                self._compare(row, found[place, -1])

    def _compare(self, row: int, found: Array) -> None:
        assert error_over_rms(found, support.forward(self.name, self.rows[row])) < LIMIT
        self.compared += 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE)])
def test_requests_come_and_go(name: str, target: str, tmp_path: Path) -> None:
    compiled = packaged(name, target, tmp_path / "package")
    slots = Slots(find_backend(target).open(compiled.folder, threads=1), name)
    first, second, third, fourth = support.prompts([2 * CHUNK + 3, 5, CHUNK + 4, WINDOW + CHUNK])
    for start in range(0, len(first), CHUNK):
        slots.prefill(2, first[start : start + CHUNK], more=bool(start))
    slots.prefill(0, second)
    slots.decode([2, 0, -1], [11, 12, 0])
    slots.prefill(3, third[:CHUNK])
    slots.decode([-1, 0, 2], [0, 13, 14])  # between two chunks of another, and in another order
    slots.prefill(3, third[CHUNK:], more=True)
    slots.decode([3, 2, 0], [15, 16, 17])
    for start in range(0, len(fourth), CHUNK):  # in the row of one that is over
        slots.prefill(0, fourth[start : start + CHUNK], more=bool(start))
        slots.decode([2, -1, 3], [18, 0, 19])
    slots.decode([0, -1, -1], [20, 0, 0])
    assert slots.compared >= 15


@pytest.mark.parametrize(
    ("target", "edits"), [("onnxruntime", None), ("ai100", "+blocked-attention{num-kv-blocks=2}<attention")]
)
def test_a_decoder_reads_prompts_row_by_row(target: str, edits: str | None, tmp_path: Path) -> None:
    """The batch answers as one that begins and ends together; also where blocks of keys are read."""
    compiled = packaged("llama", target, tmp_path / "package", edits, full_batch_size=2, kv_cache_batch_size=2)
    own = Decoder(find_backend(target).open(compiled.folder, threads=1))
    plain = support.plain_decoder("llama", target, prefill_seq_len=CHUNK, ctx_len=48, batch_size=2)
    for prompts in (support.PROMPTS, [[], support.PROMPTS[1]]):
        found, expected = own.prefill(prompts), plain.prefill(prompts)
        live = [row for row, prompt in enumerate(prompts) if prompt]
        np.testing.assert_allclose(found[live], expected[live], atol=1e-5)
        np.testing.assert_allclose(own.decode([5, 6])[live], plain.decode([5, 6])[live], atol=1e-5)


def test_rows_of_caches_are_checked(tmp_path: Path) -> None:
    compiled = packaged("llama", "onnxruntime", tmp_path / "package")
    session = find_backend("onnxruntime").open(compiled.folder, threads=1)
    for rows in ([1, 1, -1], [0, 4, 1]):
        run = Run(np.array([[5], [6], [7]]), np.array([[0], [0], [0]]), cache_rows=np.array(rows))
        with pytest.raises(RuntimeInputError, match=r"of 4 of the caches: give different ones below 4, and -1"):
            logits_of(session, run)
    idle = Run(np.array([[5], [6], [7]]), np.full((3, 1), -1), cache_rows=np.full(3, -1))
    assert not logits_of(session, idle).any()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kv_cache_batch_size": 2}, "kv_cache_batch_size=2 is less than full_batch_size=3"),
        ({"full_batch_size": 0}, "kv_cache_batch_size=4 is for continuous batching: give full_batch_size too"),
        ({"batch_size": 2}, "batch_size=2 stands beside full_batch_size=3"),
        ({"full_batch_size": -1}, "full_batch_size must be a whole number of at least 0, not -1"),
    ],
)
def test_numbers_of_rows_that_do_not_fit_are_refused(options: dict[str, int], what: str, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=what):
        packaged("llama", "onnxruntime", tmp_path, None, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_the_pass_is_driven_over_rows(target: str) -> None:
    """Level 4 of the checks reads each prompt into a row of its own, and goes on with all rows at once."""
    module = support.lowered("qwen3-next")
    specialize(module, CompileOptions(prefill_seq_len=4, ctx_len=16, full_batch_size=2))
    run_pipeline(module, Pipeline.parse(find_backend(target).pipeline))
    plan = make_plan(module)
    assert [run.cache_rows.tolist() for run in plan.runs][:5] == [[0]] * 4 + [[1]]
    before = module.clone()
    run_pipeline(module, Pipeline.parse("continuous-batching{rows=3}"), check=2)
    assert module.find(CACHE_ROW) is not None and {s.symbols[CACHE_ROWS] for s in module.specializations} == {3}
    for own, theirs in zip(drive(module, plan).outputs, drive(before, plan).outputs, strict=True):
        np.testing.assert_allclose(own["logits"], theirs["logits"], atol=1e-6)


def test_the_rows_of_a_run_are_counted_and_all_are_kept() -> None:
    for target in TARGETS:
        module = support.lowered("llama")
        specialize(module, CompileOptions(prefill_seq_len=8, ctx_len=40, full_batch_size=2))
        steps = Pipeline.parse(find_backend(target).pipeline)
        run_pipeline(module, steps)
        plain = [cost(module, item) for item in module.specializations]
        run_pipeline(module, Pipeline.parse("continuous-batching{rows=5}"))
        own = [cost(module, item) for item in module.specializations]
        assert [c.state_bytes for c in own] == [c.state_bytes for c in plain]
        assert own[1].state_bytes == 2 * own[0].state_bytes > 0
        assert [c.written_bytes for c in own] == [c.written_bytes for c in plain]
        kept = [c.resident_bytes - p.resident_bytes + p.state_bytes for c, p in zip(own, plain, strict=True)]
        assert kept == [5 * own[0].state_bytes] * 2
