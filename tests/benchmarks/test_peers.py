"""Peers run and compute the same as we do; who is missing or computes something else is told."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.bandwidth import step_bytes
from benchmarks.contenders import PEERS, Peer, Start, contenders, entrant
from benchmarks.faithful import AGREEMENT, PERPLEXITY, faithful
from benchmarks.memory import resident
from benchmarks.ours import NAME, OWN
from benchmarks.peers.contender import Entrant
from benchmarks.peers.eager import Eager
from benchmarks.peers.gguf_file import write_gguf
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
    return contenders(start, "none")[0]


def equal_steps(ours: Entrant, peer: Entrant, start: Start) -> float:
    racers: list[Any] = [ours.contender, peer.contender]
    laps = run(racers, start.rows, NEW_TOKENS, rounds=1)
    assert len({token for step in laps[ours.name].tokens for token in step}) > 3  # no constant is compared
    return rows_of("decode", [ours, peer], laps, start.rows)[1].figures["equal steps %"].median


@pytest.mark.parametrize("name", ["eager", "transformers-onnx", "openvino", "genai"])
def test_a_peer_computes_what_we_compute(name: str, ours: Entrant, start: Start) -> None:
    for needs in PEERS[name].needs["f32"]:
        if importlib.util.find_spec(needs) is None:
            pytest.skip(f"{needs} is not installed: it is in the extra 'bench'")
    peer = entrant(PEERS[name], start)
    assert peer.missing is None
    assert equal_steps(ours, peer, start) == 100


def test_llama_cpp_computes_what_transformers_computes(start: Start) -> None:
    if any(importlib.util.find_spec(needs) is None for needs in PEERS["llama.cpp"].needs["f32"]):
        pytest.skip("xllamacpp is not installed: it is in the extra 'bench'")
    one = replace(start, rows=start.rows[:1])
    peer = entrant(PEERS["llama.cpp"], one)
    assert peer.missing is None
    assert equal_steps(Entrant(Eager.name, Eager(start.model)), peer, one) == 100


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


class Odd(Eager):
    """Answers prompts of an odd number of tokens off by one."""

    name = "odd"

    def prefill(self, rows: list[list[int]]) -> list[int]:
        return [(token + len(rows[0]) % 2) % 512 for token in super().prefill(rows)]


def test_what_a_row_makes_of_prompts_stands_beside_its_speed(ours: Entrant, start: Start) -> None:
    text = prompts("tiny", 2, 12, seed=2)
    found = faithful([ours, Entrant(Odd.name, Odd(start.model))], text)
    assert found[ours.name][AGREEMENT].median == 100
    assert found[Odd.name][AGREEMENT].median == 50 and PERPLEXITY not in found[Odd.name]
    with torch.no_grad():
        logits = start.model(torch.tensor(text)[:, :-1]).logits[:, 7:]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 512), torch.tensor(text)[:, 8:].reshape(-1))
    assert found[ours.name][PERPLEXITY].median == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert faithful([replace(ours, weights="int4")], text) == {}  # nothing to compare with


@pytest.mark.parametrize("name", ["openvino", "genai", "llama.cpp"])
def test_a_peer_that_is_not_installed_is_missing_by_name(name: str, start: Start) -> None:
    peer = entrant(replace(PEERS[name], needs={"f32": ("no_such_package",)}), start)
    assert peer == Entrant(PEERS[name].name, missing="no_such_package is not installed")
    row = rows_of("decode", [peer], {"another": Laps([1.0], [1.0], [[1, 2]])}, start.rows)[0]
    assert (row.name, row.missing, row.figures) == (PEERS[name].name, peer.missing, {})


class Breaks(Eager):
    """Prepares, and fails when it is to run."""

    name = "breaks"

    def step(self, tokens: list[int]) -> list[int]:
        raise RuntimeError(f"\nno kernel for {len(tokens)} rows\nand much else")


def test_what_a_peer_raises_is_its_reason(start: Start) -> None:
    peer = entrant(replace(PEERS["eager"], make=lambda start, weights: Breaks(start.model)), start)
    assert peer.contender is None and peer.missing == "RuntimeError: no kernel for 2 rows"


def test_forms_of_weights_and_pipelines_of_ours_are_rows(start: Start) -> None:
    """A row whose pass does not exist, and a peer that is not installed, are missing with the reason."""
    joined, broken = "+fuse-products<kv-retention", "+no-such-pass"
    made = contenders(start, "eager,genai", "f32,int4", [joined, broken])
    names = [NAME, f"{NAME}, {joined}", f"{NAME}, {broken}", Eager.name, "ONNX Runtime GenAI"]
    assert [e.name for e in made if e.weights == "f32"] == names
    assert [e.name for e in made if e.weights == "int4"] == [*(own.name for own in OWN["int4"]), names[-1] + ", int4"]
    by_name = {e.name: e for e in made}
    assert "no pass 'no-such-pass'" in str(by_name[f"{NAME}, {broken}"].missing)
    assert equal_steps(by_name[NAME], by_name[f"{NAME}, {joined}"], start) == 100
    with pytest.raises(typer.BadParameter, match="there is no form of weights 'int3': it is one of f32, bf16, int8"):
        contenders(start, "none", "f32,int3")


class Ahead(Eager):
    """Goes on by itself until it is told to stop."""

    name = "ahead"
    running = False

    def prefill(self, rows: list[list[int]]) -> list[int]:
        self.running = True
        return super().prefill(rows)

    def finish(self) -> None:
        self.running = False


def test_nobody_runs_in_the_turn_of_another(start: Start) -> None:
    ahead = Ahead(start.model)
    entrant(Peer("ahead", lambda start, weights: ahead), start)
    assert not ahead.running
    run([ahead], start.rows, 2, rounds=1)
    assert not ahead.running


def test_memory_that_a_session_takes_is_measured(ours: Entrant) -> None:
    assert ours.needed is not None and ours.needed > 4 * 2 * 2 * 4 * 2 * 32 * 16  # the caches, and the weights
    before = resident()
    block = np.ones(2**25)
    assert resident() - before == pytest.approx(block.nbytes, rel=0.05)
    del block
    assert resident() - before < 2**26


@pytest.mark.parametrize("form", ["F32", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_the_model(form: str, start: Start, tmp_path: Path) -> None:
    """As transformers reads it: names, the order of rotated rows and metadata are right, and numbers are near."""
    write_gguf(start.model, tmp_path / "model.gguf", form)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        own, again = (model(torch.tensor(start.rows)).logits for model in (start.model, read))
    error = float((again - own).norm() / own.norm())
    assert {"F32": 0, "Q8_0": 1e-3, "Q4_0": 2e-2}[form] <= error <= {"F32": 1e-6, "Q8_0": 2e-2, "Q4_0": 0.4}[form]


def test_a_step_reads_every_weight_and_the_filled_cache(start: Start) -> None:
    layers, heads, head_dim, batch = 4, 2, 16, 2
    tables = {"model.embed_tokens.weight"}  # of which a step reads one row for each token
    weights = sum(4 * p.numel() for name, p in start.model.named_parameters() if name not in tables)
    read = step_bytes(start.module, batch, 10)
    assert read == weights + 4 * batch * (64 + 2 * layers * heads * 10 * head_dim)
    assert step_bytes(start.module, batch, 11) - read == 4 * batch * 2 * layers * heads * head_dim
