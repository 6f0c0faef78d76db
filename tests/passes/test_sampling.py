"""Tokens that are drawn in the graph are drawn as the contract says (§1.3), on both targets."""

from __future__ import annotations

from pathlib import Path
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

from backends import find_backend
from backends.options import CompileOptions
from passes.continuous_batching import ContinuousBatching
from passes.dtype import Dtype
from qeff_ir.arrays import Array
from qeff_ir.errors import PassError, RuntimeInputError
from qeff_ir.ir.draw import Draw
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import NEXT_TOKENS, PROBABILITIES, Run
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.drawing_decoder import DrawingDecoder
from qeff_ir.runtime.session import Session
from qeff_ir.specialize import specialize
from tests import support
from tests.models import VOCAB

TARGETS = ["onnxruntime", "ai100"]
WIDE = CompileOptions(prefill_seq_len=4, ctx_len=16, batch_size=256)
SETTINGS = Draw(
    temperature=np.array([0.7, 1.9], np.float32),
    top_k=np.array([0, 30], np.int32),
    top_p=np.array([0.9, 1.0], np.float32),
    min_p=np.array([0.0, 0.25], np.float32),
    repetition=np.array([1.8, 0.6], np.float32),
    presence=np.array([0.0, 1.5], np.float32),
)


def made(target: str, module: Module, pipeline: Pipeline, folder: Path, *, check: int = 2) -> Session:
    backend = find_backend(target)
    run_pipeline(module, pipeline, check=check)
    backend.check(module, support.OPTIONS)
    backend.emit(module, folder, support.OPTIONS)
    return backend.open(folder, threads=1)


def drawing(target: str, name: str, text: str, folder: Path) -> DrawingDecoder:
    pipeline = Pipeline.parse(support.rest_of(target)).add(text)
    return DrawingDecoder(made(target, support.canonical(name), pipeline, folder))


def shares(logits: Array, row: int, seen: list[int], answered: list[int]) -> Array:
    """Probabilities by transformers' own processors, which know no presence penalty; `SETTINGS` of a row."""
    draw = SETTINGS
    steps: Any = LogitsProcessorList()
    assert draw.repetition is not None and draw.temperature is not None and draw.presence is not None
    assert draw.top_k is not None and draw.top_p is not None and draw.min_p is not None
    scores = torch.from_numpy(logits[None].copy())
    repetition: Any = RepetitionPenaltyLogitsProcessor(float(draw.repetition[row]))
    scores = repetition(torch.tensor([seen]), scores)
    scores[0, sorted(set(answered))] -= float(draw.presence[row])
    steps.append(TemperatureLogitsWarper(float(draw.temperature[row])))
    if draw.top_k[row]:
        steps.append(TopKLogitsWarper(int(draw.top_k[row])))
    steps.append(TopPLogitsWarper(float(draw.top_p[row])))
    steps.append(MinPLogitsWarper(float(draw.min_p[row])))
    return torch.softmax(steps(torch.tensor([seen]), scores), -1)[0].numpy()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_penalties_and_cuts_are_those_of_transformers(name: str, target: str, tmp_path: Path) -> None:
    """Prompts of several chunks and of one, then steps; a second request has seen nothing of the first."""
    plain = support.open_decoder(support.canonical(name), tmp_path / "plain")
    own = drawing(target, name, "sampling{pdfs=true}", tmp_path / "own")
    assert own.top == VOCAB  # 512 is cut to the vocabulary
    own.draw, own.random = SETTINGS, np.random.default_rng(5)
    cut = 0
    for prompts in (support.PROMPTS, support.PROMPTS[::-1]):
        answered: list[list[int]] = [[], []]
        logits, tokens = plain.prefill(prompts), own.prefill(prompts)
        for _ in range(5):
            assert own.probabilities is not None
            for row, prompt in enumerate(prompts):
                expected = shares(logits[row], row, prompt + answered[row], answered[row])
                np.testing.assert_allclose(own.probabilities[row], expected, atol=1e-5)
                assert expected[tokens[row]] > 0
                cut += int((expected == 0).sum())
                answered[row].append(int(tokens[row]))
            logits, tokens = plain.decode(tokens), own.decode(tokens)
    assert cut > 100


@pytest.mark.parametrize("target", TARGETS)
def test_the_best_token_is_taken_at_temperature_0(target: str, tmp_path: Path) -> None:
    plain = support.open_decoder(support.canonical("llama"), tmp_path / "plain")
    own = drawing(target, "llama", "sampling{top=3}", tmp_path / "own")
    assert own.top == 3 and own.probabilities is None
    for prompts in (support.PROMPTS, [[], support.PROMPTS[1]]):  # idle rows stay idle
        real = [bool(prompt) for prompt in prompts]
        best, tokens = plain.prefill(prompts).argmax(-1), own.prefill(prompts)
        for _ in range(6):
            np.testing.assert_array_equal(tokens[real], best[real])
            best, tokens = plain.decode(best).argmax(-1), own.decode(best)
    with pytest.raises(RuntimeInputError, match="returns tokens that it draws, and no logits"):
        own.check_scores()
    own.draw = Draw(allowed=np.ones((2, VOCAB), dtype=bool))
    with pytest.raises(RuntimeInputError, match="takes no mask of tokens"):
        own.prefill(support.PROMPTS)


def contract(logits: Array, temperature: float, top: int, top_k: int, top_p: float, min_p: float) -> tuple[Array, ...]:
    """The contract's algorithm in its own words: candidates from the worst to the best, and which of them are left."""
    order = np.argsort(logits, kind="stable")[-top:]
    scores = logits[order].astype(np.float64) / temperature
    left = np.arange(top) >= top - min(top_k, top)
    masked = np.where(left, scores, -65504.0)
    share = np.exp(masked - masked.max())
    share /= share.sum()
    left &= np.cumsum(share) > 1 - top_p
    left &= share >= min_p * share[-1]
    left[-1] = True
    return order, scores, left


CUTS = {"all": (20, 1.0, 0.0), "top-k": (4, 1.0, 0.0), "top-p": (20, 0.6, 0.0), "min-p": (20, 1.0, 0.8)}


@pytest.mark.parametrize("target", TARGETS)
def test_tokens_are_drawn_by_their_probabilities(target: str, tmp_path: Path) -> None:
    """Rows of one prompt: 2,048 draws for each cut, against the probabilities that the algorithm gives."""
    top, rows = 20, WIDE.batch_size
    modules = [support.lowered("llama"), support.lowered("llama")]
    for module in modules:
        specialize(module, WIDE)
        run_pipeline(module, Pipeline.parse(support.CANONICAL))
    stock = Pipeline.parse(support.rest_of(target))
    plain = Decoder(made(target, modules[0], stock, tmp_path / "plain"))
    own = DrawingDecoder(made(target, modules[1], stock.add(f"sampling{{top={top}}}"), tmp_path / "own"))
    prompt = support.PROMPTS[1][:3]
    logits = plain.prefill([prompt] * rows)[0]
    own.random = np.random.default_rng(11)
    for name, (top_k, top_p, min_p) in CUTS.items():
        order, scores, left = contract(logits, 1.5, top, top_k, top_p, min_p)
        assert (left.sum() < top) == (name != "all")
        expected = np.zeros(VOCAB)
        expected[order] = np.where(left, np.exp(scores - scores.max()), 0)
        expected /= expected.sum()
        each = {
            "temperature": np.full(rows, 1.5, np.float32),
            "top_k": np.full(rows, top_k, np.int32),
            "top_p": np.full(rows, top_p, np.float32),
            "min_p": np.full(rows, min_p, np.float32),
        }
        counts = np.zeros(VOCAB)
        for _ in range(8):
            numbers = own.random.random((rows, top), dtype=np.float32)
            own.draw = Draw(**each, numbers=numbers)
            tokens = own.prefill([prompt] * rows)
            noise = -np.log(-np.log(numbers.astype(np.float64)))
            best = np.where(left, scores + noise, -np.inf).argmax(1)
            assert (tokens == order[best]).mean() > 0.995  # two candidates may be as good but for rounding
            counts += np.bincount(tokens, minlength=VOCAB)
        drawn = expected > 0
        assert counts[~drawn].sum() == 0
        chi_square = ((counts - counts.sum() * expected)[drawn] ** 2 / (counts.sum() * expected)[drawn]).sum()
        freedom = drawn.sum() - 1
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("target", TARGETS)
def test_only_tokens_of_the_mask_are_drawn(target: str, tmp_path: Path) -> None:
    plain = support.open_decoder(support.canonical("llama"), tmp_path / "plain")
    own = drawing(target, "llama", "sampling{guided=true pdfs=true}", tmp_path / "own")
    allowed = np.zeros((2, VOCAB), dtype=bool)
    allowed[0, [7, 50]], allowed[1] = True, True
    own.draw = Draw(allowed=allowed)
    logits, tokens = plain.prefill(support.PROMPTS), own.prefill(support.PROMPTS)
    assert logits[0].argmax() not in (7, 50)
    np.testing.assert_array_equal(tokens, [[7, 50][logits[0, [7, 50]].argmax()], logits[1].argmax()])
    own.draw = Draw(allowed=allowed, temperature=np.full(2, 5.0, np.float32))
    found = {int(own.decode(tokens)[0]) for _ in range(20)}
    assert found == {7, 50}
    assert own.probabilities is not None and (own.probabilities[0] > 0).sum() == 2


@pytest.mark.parametrize("target", TARGETS)
def test_tables_go_with_the_rows_of_the_caches(target: str, tmp_path: Path) -> None:
    """Prompts are read into rows 2 and 0; both are continued in another order, and rows of -1 are idle."""
    stock = Pipeline.parse(support.rest_of(target)).add("continuous-batching{rows=4}")
    plain = made(target, support.canonical("llama"), stock, tmp_path / "plain")
    session = made(target, support.canonical("llama"), stock.add("sampling{pdfs=true}"), tmp_path / "own")
    prompt = support.PROMPTS[1]
    penalty = Draw(repetition=np.array([3.0, 3.0], np.float32), presence=np.array([2.0, 2.0], np.float32))

    def step(tokens: list[list[int]], positions: list[list[int]], rows: list[int]) -> tuple[Array, Array]:
        run = Run(np.array(tokens), np.array(positions), cache_rows=np.array(rows), draw=penalty)
        made_by = [s.run({p.name: p.feed(run) for p in s.interface.inputs}) for s in (plain, session)]
        return made_by[0]["logits"][:, 0], made_by[1][name(session, PROBABILITIES)][:, 0]

    def expected(logits: Array, seen: list[int], answered: list[int]) -> Array:
        repetition: Any = RepetitionPenaltyLogitsProcessor(3.0)
        scores = repetition(torch.tensor([seen]), torch.from_numpy(logits[None].copy()))
        scores[0, answered] -= 2.0
        return torch.softmax(scores, -1)[0].numpy()

    other = [t + 1 for t in prompt]
    logits, found = step([prompt + [0] * 3, other + [0] * 3], [[*range(5), -1, -1, -1]] * 2, [2, 0])
    np.testing.assert_allclose(found[0], expected(logits[0], prompt, []), atol=1e-5)
    np.testing.assert_allclose(found[1], expected(logits[1], other, []), atol=1e-5)
    logits, found = step([[9], [0]], [[5], [-1]], [2, -1])
    np.testing.assert_allclose(found[0], expected(logits[0], [*prompt, 9], [9]), atol=1e-5)
    logits, found = step([[8], [7]], [[5], [6]], [0, 2])
    np.testing.assert_allclose(found[0], expected(logits[0], [*other, 8], [8]), atol=1e-5)
    np.testing.assert_allclose(found[1], expected(logits[1], [*prompt, 9, 7], [9, 7]), atol=1e-5)
    logits, found = step([other + [0] * 3, [0] * 8], [[*range(5), -1, -1, -1], [-1] * 8], [2, -1])  # row 2 is new
    np.testing.assert_allclose(found[0], expected(logits[0], other, []), atol=1e-5)


def name(session: Session, role: object) -> str:
    return next(port.name for port in session.interface.outputs if port.role is role)


@pytest.mark.parametrize("target", TARGETS)
def test_tokens_of_drafts_have_random_numbers_of_their_own(target: str, tmp_path: Path) -> None:
    stock = Pipeline.parse(support.rest_of(target)).with_options("last-logits", keep=3)
    plain = made(target, support.canonical("llama"), stock, tmp_path / "plain")
    session = made(target, support.canonical("llama"), stock.add("sampling{top=40}"), tmp_path / "own")
    prompt = np.array([support.PROMPTS[0][:8]] * 2)
    for session_ in (plain, session):
        run = Run(prompt, np.tile(np.arange(8), (2, 1)), sizes={"num_logits_to_keep": 1})
        session_.run({p.name: p.feed(run) for p in session_.interface.inputs})
    tokens, positions = np.array([[5, 6, 7]] * 2), np.tile(np.arange(8, 11), (2, 1))
    sizes = {"num_logits_to_keep": 3}
    numbers = np.random.default_rng(2).random((2, 3, 40), dtype=np.float32)
    draw = Draw(temperature=np.array([0.0, 2.0], np.float32), numbers=numbers)
    run = Run(tokens, positions, keep=3, sizes=sizes, draw=draw)
    logits = plain.run({p.name: p.feed(run) for p in plain.interface.inputs})["logits"]
    found = session.run({p.name: p.feed(run) for p in session.interface.inputs})[name(session, NEXT_TOKENS)]
    np.testing.assert_array_equal(found[0, :, 0], logits[0].argmax(-1))
    for at in range(3):
        order, scores, _ = contract(logits[1, at], 2.0, 40, 40, 1.0, 0.0)
        assert found[1, at, 0] == order[(scores - np.log(-np.log(numbers[1, at]))).argmax()]


def test_draws_are_float32_whatever_the_model_computes_in(tmp_path: Path) -> None:
    stock = Pipeline.parse(support.rest_of("ai100"))
    backend, found = find_backend("ai100"), list[Array]()
    pipelines = [stock.add("dtype{type=float16}"), stock.add("sampling{pdfs=true}").add("dtype{type=float16}")]
    for number, pipeline in enumerate(pipelines):
        module = support.canonical("llama")
        run_pipeline(module, pipeline, check=2)
        backend.emit(module, tmp_path / str(number), support.OPTIONS)
        session = backend.open(tmp_path / str(number), threads=1)
        run = Run(np.array([support.PROMPTS[0][:8]] * 2), np.tile(np.arange(8), (2, 1)), draw=SETTINGS)
        outputs = session.run({p.name: p.feed(run) for p in session.interface.inputs})
        found.append(outputs["probs" if "probs" in outputs else "logits"][:, 0])
    logits, probabilities = found
    prompt = support.PROMPTS[0][:8]
    for row in range(2):
        np.testing.assert_allclose(probabilities[row], shares(logits[row], row, prompt, []), atol=1e-5)


def test_what_cannot_be_drawn_from_is_refused() -> None:
    stock = Pipeline.parse(support.rest_of("onnxruntime"))
    for pipeline, why in (
        (stock.add("sampling").add("sampling"), "there are no logits to draw from"),
        (stock.without("last-logits").add("sampling"), "of all tokens: put last-logits into the pipeline"),
        (stock.add("sampling{top=0}"), "top is 0: draw from at least 1 token"),
        (Pipeline((*stock.add("sampling").passes, Dtype())), "put dtype before sampling"),
        (Pipeline((*stock.add("sampling").passes, ContinuousBatching())), "put continuous-batching before sampling"),
    ):
        with pytest.raises(PassError, match=why):
            run_pipeline(support.canonical("llama"), pipeline)
    with pytest.raises(PassError, match="returns tokens that it draws, and no logits to compare"):
        run_pipeline(support.canonical("llama"), stock.add("sampling"), check=4)
