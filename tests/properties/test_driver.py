"""P11 of the runtime: prompts, decode steps and new requests through `Decoder`, in any order, on both backends."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from backends import backend_names, find_backend
from backends.options import CompileOptions
from qeff_ir import numerics
from qeff_ir.errors import RuntimeInputError
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.specialize import specialize
from qeff_ir.testing.build import build
from qeff_ir.testing.recipe import Layer, Recipe, answer

ROWS, CHUNK, CTX = 3, 3, 11
RECIPES = {
    "rings and full caches": Recipe(
        (Layer(window=3), Layer(), Layer(window=1)),
        kv_heads=2,
        group=2,
        head_dim=8,
        value_dim=8,
        rotary="half",
        bias=True,
    ),
    "sinks and a shared cache": Recipe(
        (Layer(window=4, sinks=True), Layer(shares=0, sinks=True), Layer(experts=3)),
        kv_heads=2,
        rotary="partial",
        softcap=2.0,
    ),
    "recurrent states": Recipe(
        (Layer(linear="delta", kernel=3), Layer(window=3), Layer(linear="decay", kernel=1)), kv_heads=2, qk_norm=True
    ),
    "only recurrent states": Recipe((Layer(linear="decay", kernel=4), Layer(linear="delta")), gated=True, tied=True),
    "written out": Recipe(
        (Layer(window=2, decomposed=True), Layer(decomposed=True)),
        group=2,
        learned_positions=True,
        norm="layer",
        gemm=True,
    ),
}


@functools.cache
def compiled(name: str, target: str) -> tuple[Decoder, float]:
    """A driver, and the largest error allowed."""
    module = build(RECIPES[name]).module
    limit = numerics.bound(numerics.depth(module))
    options = CompileOptions(prefill_seq_len=CHUNK, ctx_len=CTX, batch_size=ROWS)
    specialize(module, options)
    backend = find_backend(target)
    run_pipeline(module, Pipeline.parse(backend.pipeline))
    with tempfile.TemporaryDirectory() as folder:
        backend.check(module, options)
        backend.emit(module, Path(folder), options)
        return Decoder(backend.open(Path(folder), threads=1)), limit


@functools.cache
def right(name: str, row: tuple[int, ...]) -> np.ndarray:
    return answer(RECIPES[name], row)[-1]


class Requests(RuleBasedStateMachine):
    """What a user does with one open package."""

    @initialize(name=st.sampled_from(list(RECIPES)), backend=st.sampled_from(backend_names()))
    def open(self, name: str, backend: str) -> None:
        self.name = name
        self.decoder, self.limit = compiled(name, backend)
        self.rows: list[list[int]] = []
        with pytest.raises(RuntimeInputError, match="every prompt is empty"):
            self.decoder.prefill([[]] * ROWS)

    def compare(self, logits: np.ndarray) -> None:
        live = [i for i, row in enumerate(self.rows) if row]
        exact = np.stack([right(self.name, tuple(self.rows[i])) for i in live])
        error = numerics.error_over_rms(logits[live], exact)
        assert error <= self.limit, f"{self.name}: {error / self.limit:.2f} x the bound at {list(map(len, self.rows))}"
        assert self.decoder.positions.tolist() == [len(row) or -1 for row in self.rows]

    @rule(lengths=st.lists(st.integers(0, CTX), min_size=ROWS, max_size=ROWS).filter(any), seed=st.integers(0, 9))
    def prefill(self, lengths: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        self.rows = [random.integers(0, RECIPES[self.name].vocab, n).tolist() for n in lengths]
        self.compare(self.decoder.prefill(self.rows))

    @precondition(lambda self: any(self.rows) and max(map(len, self.rows)) < CTX)
    @rule(steps=st.integers(1, 4), seed=st.integers(0, 9))
    def decode(self, steps: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(min(steps, CTX - max(map(len, self.rows)))):
            tokens = random.integers(0, RECIPES[self.name].vocab, ROWS)
            self.rows = [[*row, int(t)] if row else [] for row, t in zip(self.rows, tokens, strict=True)]
            self.compare(self.decoder.decode(tokens))

    @precondition(lambda self: any(self.rows) and max(map(len, self.rows)) == CTX)
    @rule()
    def a_full_context_is_refused(self) -> None:
        with pytest.raises(RuntimeInputError, match="context of 11 tokens is full"):
            self.decoder.decode([0] * ROWS)

    @rule()
    def a_prompt_longer_than_the_context_is_refused(self) -> None:
        with pytest.raises(RuntimeInputError, match="12 tokens"):
            self.decoder.prefill([[0] * (CTX + 1)] * ROWS)


TestRequests = Requests.TestCase
TestRequests.settings = settings(stateful_step_count=8)
