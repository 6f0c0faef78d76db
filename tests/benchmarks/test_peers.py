"""Peers run and compute the same as we do; who is missing or computes something else is told."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.bandwidth import step_bytes
from benchmarks.contenders import PEERS, Ours, Start, contenders, entrant
from benchmarks.peers.contender import Entrant
from benchmarks.peers.eager import Eager
from benchmarks.prepare import lowered
from benchmarks.race import Laps, rows_of, run
from benchmarks.shapes import prompts, random_model
from qeff_ir.frontend.checkpoint.weights import memory_weights

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    model = random_model("tiny", 32)
    module = lowered(model, memory_weights(model))
    return Start(model, module, prompts("tiny", 2, 7), 32, 1, tmp_path_factory.mktemp("race"))


@pytest.fixture(scope="module")
def ours(start: Start) -> Entrant:
    return contenders(replace(start, module=start.module.clone()), "none")[0]


def equal_steps(ours: Entrant, peer: Entrant, start: Start) -> float:
    racers: list[Any] = [ours.contender, peer.contender]
    laps = run(racers, start.rows, NEW_TOKENS, rounds=1)
    assert len({token for step in laps[Ours.name].tokens for token in step}) > 3  # no constant is compared
    return rows_of("decode", [ours, peer], laps, start.rows)[1].figures["equal steps %"].median


@pytest.mark.parametrize("name", ["eager", "transformers-onnx", "openvino", "genai"])
def test_a_peer_computes_what_we_compute(name: str, ours: Entrant, start: Start) -> None:
    needs = PEERS[name].needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: it is in the extra 'bench'")
    peer = entrant(PEERS[name], start)
    assert peer.missing is None
    assert equal_steps(ours, peer, start) == 100


class Wrong(Eager):
    """Answers the first steps as it should, the rest off by one."""

    name = "wrong"

    def prefill(self, rows: list[list[int]]) -> list[int]:
        self.steps = 0
        return super().prefill(rows)

    def step(self, tokens: list[int]) -> list[int]:
        self.steps += 1
        return [(token + (self.steps > 2)) % 512 for token in super().step(tokens)]


def test_who_computes_something_else_is_told(ours: Entrant, start: Start) -> None:
    # The prompt's token and two steps are right, each of which counts once.
    share = equal_steps(ours, Entrant(Wrong.name, Wrong(start.model)), start)
    assert share < 100 and share == pytest.approx(100 * 3 / (NEW_TOKENS + 1))


@pytest.mark.parametrize("name", ["openvino", "genai"])
def test_a_peer_that_is_not_installed_is_missing_by_name(name: str, start: Start) -> None:
    peer = entrant(replace(PEERS[name], needs="no_such_package"), start)
    assert peer == Entrant(PEERS[name].name, missing="no_such_package is not installed")
    row = rows_of("decode", [peer], {"another": Laps([1.0], [1.0], [[1, 2]])}, start.rows)[0]
    assert (row.name, row.missing, row.figures) == (PEERS[name].name, peer.missing, {})


class Breaks(Eager):
    """Prepares, and fails when it is to run."""

    name = "breaks"

    def step(self, tokens: list[int]) -> list[int]:
        raise RuntimeError(f"\nno kernel for {len(tokens)} rows\nand much else")


def test_what_a_peer_raises_is_its_reason(start: Start) -> None:
    peer = entrant(replace(PEERS["eager"], make=lambda start: Breaks(start.model)), start)
    assert peer.contender is None and peer.missing == "RuntimeError: no kernel for 2 rows"


def test_a_step_reads_every_weight_and_the_filled_cache(start: Start) -> None:
    layers, heads, head_dim, batch = 4, 2, 16, 2
    tables = {"model.embed_tokens.weight"}  # of which a step reads one row for each token
    weights = sum(4 * p.numel() for name, p in start.model.named_parameters() if name not in tables)
    read = step_bytes(start.module, batch, 10)
    assert read == weights + 4 * batch * (64 + 2 * layers * heads * 10 * head_dim)
    assert step_bytes(start.module, batch, 11) - read == 4 * batch * 2 * layers * heads * head_dim
