"""Drafts change how many runs an answer takes, and no token of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import find_backend
from qeff_ir.compiler import compile_model
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.runtime.batching import Stats
from qeff_ir.runtime.engine import Engine
from qeff_ir.runtime.jobs import Job, Sampling
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.speculation import Drafter, DraftModel, PromptLookup
from tests import support

SHAPES: dict[str, Any] = {"prefill_seq_len": 8, "ctx_len": 64, "batch_size": 2}


def opened(name: str, target: str = "onnxruntime", **options: Any) -> Session:
    folder: Path = compile_model(
        support.Lowered(name), {**SHAPES, **options}, target=target, emit_only=target == "ai100"
    ).folder
    return find_backend(target).open(folder, threads=1)


class Contrary:
    """Drafts tokens that mostly do not come, of another number each time."""

    def __init__(self) -> None:
        self._lengths = itertools.cycle([3, 0, 1, 2])

    def draft(self, tokens: Sequence[int] | Any, most: int, slot: int = 0) -> list[int]:
        known = np.asarray(tokens)
        return [int((known[-1] + 5 * i) % 97) for i in range(1, 1 + min(most, next(self._lengths)))]


def jobs() -> list[Job]:
    """Two greedy ones and two that are sampled; a prompt repeats itself, and one fills the context."""
    again = support.prompts([5], seed=1)[0] * 4
    prompts = [again, *support.prompts([3, 30, 9], seed=2)]
    hot = [Sampling(), Sampling(), Sampling(1.3, seed=5), Sampling(0.8, top_k=20, repetition_penalty=1.2, seed=6)]
    return [Job(p, n, sampling=s) for p, n, s in zip(prompts, (40, 62, 34, 25), hot, strict=True)]


def answers(session: Session, drafter: Drafter | None) -> tuple[list[list[int]], Stats]:
    with Engine(session, drafter=drafter) as engine:
        tickets = [engine.submit(job) for job in jobs()]
        found = [[emitted.token for emitted in ticket] for ticket in tickets]
        return found, engine.stats()


@pytest.mark.parametrize(
    ("name", "target"), [("llama", "onnxruntime"), ("mistral", "ai100"), ("gemma3", "onnxruntime")]
)
def test_answers_are_those_without_drafts(name: str, target: str) -> None:
    """Also where windows turn several times, prompts are used again, and most of a draft is rejected."""
    session = opened(name, target, num_speculative_tokens=[0, 3])
    expected, plain = answers(session, None)
    assert [len(answer) for answer in expected] == [40, 62, 34, 25] and plain.drafted == 0
    contrary, stats = answers(session, Contrary())
    assert contrary == expected and stats.drafted > 2 * stats.accepted + 20
    same, stats = answers(session, DraftModel(opened(name, target)))
    assert same == expected
    assert stats.accepted > 0.3 * stats.drafted and stats.decode_runs < 0.8 * plain.decode_runs
    found, _ = answers(session, PromptLookup())
    assert found == expected


def test_greedy_answers_are_those_of_transformers() -> None:
    session = opened("llama", num_speculative_tokens=3)
    tokens = support.prompts([6], seed=8)[0] * 2
    with Engine(session, drafter=PromptLookup()) as engine:
        found = [emitted.token for emitted in engine.submit(Job(tokens, 30))]
    for token in found:
        assert token == int(support.forward("llama", tokens).argmax())
        tokens = [*tokens, token]
    assert len(set(found)) > 1


def test_a_stop_token_inside_a_draft_ends_the_answer() -> None:
    session = opened("llama", num_speculative_tokens=3)
    expected, _ = answers(session, None)
    stop = expected[0][11]
    end = expected[0].index(stop) + 1
    with Engine(session, drafter=DraftModel(opened("llama"))) as engine:
        ticket = engine.submit(Job(jobs()[0].tokens, 40, frozenset({stop})))
        assert [emitted.token for emitted in ticket] == expected[0][:end] and ticket.finish == "stop"
        again = [emitted.token for emitted in engine.submit(jobs()[0])]
    assert again == expected[0]


@pytest.mark.parametrize(
    ("tokens", "most", "draft"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 3, [4, 1, 2]),
        ([7, 3, 8, 5, 3, 9, 6, 3], 2, [9, 6]),
        ([1, 2, 9, 7, 2, 8, 1, 2], 1, [9]),
        ([4, 4], 5, [4]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
    ],
)
def test_a_prompt_tells_what_followed(tokens: list[int], most: int, draft: list[int]) -> None:
    assert PromptLookup().draft(tokens, most) == draft


def test_a_model_for_drafts_says_its_best_tokens() -> None:
    model, row = DraftModel(opened("mistral")), support.prompts([20], seed=7)[0]
    for tokens in (row, row[:7], [*row[:7], 5, 6], row + row[:3], row):  # goes on, and goes back
        expected = list(tokens)
        for _ in range(3):
            expected.append(int(support.forward("mistral", expected).argmax()))
        assert model.draft(tokens, 3) == expected[len(tokens) :]
    assert model.draft(row * 3 + row[:3], 5) == model.draft(row * 3 + row[:3], 2)  # there is room for two


def test_what_cannot_draft_or_verify_is_told() -> None:
    with pytest.raises(PackageError, match="verifies no drafts: compile with num_speculative_tokens"):
        Engine(opened("llama"), drafter=PromptLookup())
    with pytest.raises(PackageError, match=r"conv_state\.0 cannot go back behind a rejected draft"):
        DraftModel(opened("qwen3-next"))
    with pytest.raises(RuntimeInputError, match="the model for drafts has 2 slots"):
        DraftModel(opened("llama")).draft([1], 1, slot=2)
