"""Tokens are chosen as transformers' own processors would have it, and drawn with the right frequencies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.jobs import Sampling
from qeff_ir.runtime.sampling import Chooser

VOCAB = 40
LOGITS = (np.random.default_rng(0).standard_normal(VOCAB) * 2).astype(np.float32)
PROMPT = [3, 5, 5, int(LOGITS.argmax())]
DRAWS = 4000


def expected(s: Sampling) -> Array:
    """The distribution by transformers' processors, float64 ``[vocab]``."""
    steps: list[Any] = [RepetitionPenaltyLogitsProcessor(s.repetition_penalty), TemperatureLogitsWarper(s.temperature)]
    steps += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    scores = LogitsProcessorList(steps)(torch.LongTensor([PROMPT]), torch.from_numpy(LOGITS.copy())[None])
    return torch.softmax(scores.double(), dim=-1)[0].numpy()


def plainly(s: Sampling, logits: Array, number: float) -> int:
    """The token at a number from 0 to 1 of what is left of a distribution, all of it sorted and summed."""
    scores = logits.astype(np.float64) / s.temperature
    ids = np.argsort(-scores, kind="stable")[: s.top_k or len(scores)]
    sums = np.exp(scores[ids] - scores.max()).cumsum()
    ids = np.sort(ids[: int(np.searchsorted(sums, s.top_p * sums[-1])) + 1])
    sums = np.exp(scores[ids] - scores.max()).cumsum()
    return int(ids[np.searchsorted(sums, number * sums[-1], side="right")])


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 3000}], ids=str)
def test_a_large_vocabulary_is_summed_in_parts_with_the_same_tokens(settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"temperature": 0.7, **settings}
    rng = np.random.default_rng(1)
    found, wanted = list[int](), list[int]()
    for seed in range(60):
        logits = rng.standard_normal(20_000).astype(np.float32)
        found.append(Chooser(Sampling(seed=seed, **given), PROMPT).choose(logits))
        wanted.append(plainly(Sampling(**given), logits, float(np.random.default_rng(seed).random())))
    assert found == wanted and len(set(found)) > 50


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5, "top_k": 5},
        {"top_p": 0.7},
        {"temperature": 2.0, "min_p": 0.3},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_transformers_would(settings: dict[str, Any]) -> None:
    """No token beyond what is left, and a chi-square of what is far below what chance gives once in a million."""
    given: dict[str, Any] = {"temperature": 1.0, **settings}
    sampling = Sampling(**given)
    share = expected(sampling)
    found = [Chooser(replace(sampling, seed=seed), PROMPT).choose(LOGITS) for seed in range(DRAWS)]
    counts = np.bincount(found, minlength=VOCAB)
    assert counts[share == 0].sum() == 0
    left = share > 0
    assert left.sum() > 1
    degrees = left.sum() - 1
    statistic = float(((counts[left] - DRAWS * share[left]) ** 2 / (DRAWS * share[left])).sum())
    assert statistic < degrees + 5 * math.sqrt(2 * degrees) + 10


def test_a_seed_repeats_an_answer_and_another_does_not() -> None:
    def drawn(seed: int | None) -> list[int]:
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), PROMPT)
        return [chooser.choose(LOGITS) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_greedy_takes_the_best_and_leaves_the_logits_alone() -> None:
    before = LOGITS.copy()
    assert Chooser(Sampling(), PROMPT).choose(LOGITS) == LOGITS.argmax()
    assert Chooser(Sampling(bias={7: 99.0}, repetition_penalty=2.0), PROMPT).choose(LOGITS) == 7
    np.testing.assert_array_equal(LOGITS, before)


def test_penalties_count_the_answer_alone_and_the_prompt_with_repetition() -> None:
    best, second = np.argsort(-LOGITS)[:2]
    gap = float(LOGITS[best] - LOGITS[second])
    present = Chooser(Sampling(presence_penalty=gap + 0.01), [int(best)])
    assert [present.choose(LOGITS), present.choose(LOGITS)] == [best, second]
    often = Chooser(Sampling(frequency_penalty=0.6 * gap), [int(best)])
    assert [often.choose(LOGITS) for _ in range(3)] == [best, best, second]
    assert Chooser(Sampling(repetition_penalty=50.0), [int(best)]).choose(LOGITS) != best


class Allows:
    """A constraint of two tokens, and what it was told."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.chosen = tokens, list[int]()

    def mask(self) -> Array:
        allowed = np.zeros(VOCAB, dtype=np.bool_)
        allowed[list(self.tokens)] = True
        return allowed

    def advance(self, token: int) -> None:
        self.chosen.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_constraint_is_kept_and_told(temperature: float) -> None:
    constraint = Allows(2, 4)
    chooser = Chooser(Sampling(temperature=temperature, seed=0), PROMPT, constraint)
    found = [chooser.choose(LOGITS) for _ in range(9)]
    assert set(found) <= {2, 4}
    assert constraint.chosen == found
    with pytest.raises(RuntimeInputError, match="allows no token"):
        Chooser(Sampling(), PROMPT, Allows()).choose(LOGITS)


def test_log_probabilities_are_of_the_models_own_logits() -> None:
    exact = torch.log_softmax(torch.from_numpy(LOGITS).double(), dim=-1).numpy()
    chooser = Chooser(Sampling(bias={7: 99.0}, logprobs=3), PROMPT)
    logprob, best = chooser.told(LOGITS, chooser.choose(LOGITS))
    assert logprob == pytest.approx(exact[7], abs=1e-5)
    assert [token for token, _ in best] == np.argsort(-LOGITS)[:3].tolist()
    np.testing.assert_allclose([p for _, p in best], np.sort(exact)[::-1][:3], atol=1e-5)
    assert Chooser(Sampling(), PROMPT).told(LOGITS, 7) == (None, [])


def test_a_nucleus_that_is_wider_than_what_is_sorted_first() -> None:
    flat = np.zeros(5000, dtype=np.float32)
    chooser = Chooser(Sampling(temperature=1.0, top_p=0.5, seed=0), [])
    found = {chooser.choose(flat) for _ in range(20_000)}
    assert 2400 < len(found) <= 2500  # of the 2,500 that are left, one in 3,000 is not drawn in so many


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: give at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0: give a share"),
        ({"min_p": 1.5}, "min_p is 1.5: give a share"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: give more than 0"),
        ({"bias": {3: math.inf}}, "no finite number"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message.replace(".", r"\.")):
        Sampling(**wrong)
