"""However a request is cut into runs, the answer is that of one forward pass over the whole row."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from transformers import PreTrainedModel

from qeff_ir import numerics
from qeff_ir.arrays import Array
from qeff_ir.runtime.decoder import Decoder
from tests import support
from tests.models import VOCAB

CHUNK, CTX = support.OPTIONS.prefill_seq_len, support.OPTIONS.ctx_len
ROWS = support.OPTIONS.batch_size


@functools.cache
def decoder(name: str) -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        return support.open_decoder(support.canonical(name), Path(folder))


@functools.cache
def exact(name: str) -> PreTrainedModel:
    return copy.deepcopy(support.tiny(name)[1]).double()


def one_shot(name: str, row: tuple[int, ...]) -> Array:
    """Logits of every token in double precision, ``[tokens, vocab]``."""
    with torch.no_grad():
        return exact(name)(torch.tensor([row]), use_cache=False).logits[0].numpy()


class Chunks(RuleBasedStateMachine):
    """Rows grow by runs of any number of real tokens each, padded on the right; rows can start anew at any time."""

    name: str

    def __init__(self) -> None:
        super().__init__()
        self.session = decoder(self.name).session
        self.limit = numerics.bound(numerics.depth(support.lowered(self.name)))
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.told: dict[tuple[int, ...], list[Array]] = {}

    @initialize()
    def start(self) -> None:
        self.session.reset()

    def run_tokens(self, news: list[list[int]], length: int) -> None:
        ids = np.zeros((ROWS, length), np.int64)
        positions = np.full_like(ids, -1)
        for row, new in enumerate(news):
            ids[row, : len(new)] = new
            positions[row, : len(new)] = np.arange(len(new)) + len(self.rows[row])
            self.rows[row] += new
        logits = self.session.run({"input_ids": ids, "position_ids": positions})["logits"]
        for row, new in enumerate(news):
            if new:
                self.told.setdefault(tuple(self.rows[row]), []).append(logits[row, 0])

    def teardown(self) -> None:
        """Compare all that was told: the answers to the beginnings of a row are part of that to the whole row."""
        longest: dict[tuple[int, ...], Array] = {}
        for row in sorted(self.told, key=len, reverse=True):
            whole = next((known for known in longest if known[: len(row)] == row), None)
            if whole is None:
                whole, longest[row] = row, one_shot(self.name, row)
            for logits in self.told[row]:
                error = numerics.error_over_rms(logits, longest[whole][len(row) - 1])
                assert error <= self.limit, f"after {len(row)} tokens: {error / self.limit:.2f} x the bound"

    @precondition(lambda self: max(map(len, self.rows)) + CHUNK <= CTX)
    @rule(lengths=st.tuples(*[st.integers(0, CHUNK)] * ROWS), seed=st.integers(0, 9))
    def chunk(self, lengths: tuple[int, ...], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.run_tokens([rng.integers(4, VOCAB, n).tolist() for n in lengths], CHUNK)

    @precondition(lambda self: max(map(len, self.rows)) + 5 <= CTX)
    @rule(active=st.tuples(*[st.booleans()] * ROWS), steps=st.integers(1, 5), seed=st.integers(0, 9))
    def decode(self, active: tuple[bool, ...], steps: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            self.run_tokens([rng.integers(4, VOCAB, 1).tolist() if on else [] for on in active], 1)

    @rule(row=st.integers(0, ROWS - 1))
    def restart_one_row(self, row: int) -> None:
        """A new request in one row over what the old one left: nothing of it may be seen."""
        self.rows[row] = []

    @rule()
    def reset(self) -> None:
        self.session.reset()
        self.rows = [[] for _ in range(ROWS)]


class Windowed(Chunks):
    """Rings: windows shorter than a chunk."""

    name = "mistral"


class Full(Chunks):
    """Caches that keep every token, attention in ONNX Runtime's kernel."""

    name = "llama"


class Mixed(Chunks):
    """Both kinds in one model, and soft-caps."""

    name = "gemma2"


TestWindowed = Windowed.TestCase
TestFull = Full.TestCase
TestMixed = Mixed.TestCase
TestWindowed.settings = TestFull.settings = TestMixed.settings = settings(stateful_step_count=12)
