"""An engine's thread, its queue and its order; `properties/test_engine.py` holds what it answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.runtime.batching import Batching
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.engine import Engine
from qeff_ir.runtime.jobs import EngineClosedError, EngineFullError, Job, Sampling, Ticket
from qeff_ir.runtime.prefixes import Prefixes
from qeff_ir.runtime.rows import Piece, Rows
from tests import support
from tests.models import VOCAB

CTX, CHUNK = 48, 8


class Watched:
    """A session that tells of its runs, can be held between two, and can fail."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.interface, self.specializations = inner, inner.interface, inner.specializations
        self.free = False
        self.shapes: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails = 0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert self.gate.wait(20)
        self.shapes.append(inputs["input_ids"].shape)
        if self.fails:
            self.fails -= 1
            raise PackageError("a run fails")
        return self.inner.run(inputs)

    def state(self, name: str) -> Array:
        return self.inner.state(name)

    def write(self, name: str, data: Array, slot: int | None = None) -> None:
        self.inner.write(name, data, slot)

    def reset(self) -> None:
        self.inner.reset()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("engine")
    return support.open_decoder(support.canonical("llama"), folder).session


@pytest.fixture
def session(opened: Any) -> Watched:
    return Watched(opened)


@pytest.fixture
def engine(session: Watched) -> Iterator[Engine]:
    made = Engine(session, queue=2)
    yield made
    session.gate.set()
    made.close(drain=False)


def solo(session: Watched, prompt: list[int], new: int, shares: list[float] | None = None) -> list[int]:
    """Tokens of a greedy answer by a `Decoder`, and their log probabilities."""
    decoder, found = Decoder(session.inner), list[int]()
    logits = decoder.prefill([prompt, []])
    while True:
        found.append(int(logits[0].argmax()))
        if shares is not None:
            shares.append(float(logits[0].max() - np.log(np.exp(logits[0]).sum())))
        if len(found) == new:
            return found
        logits = decoder.decode([found[-1], 0])


def test_tickets_give_the_tokens_of_a_solo_run(session: Watched, engine: Engine) -> None:
    prompts = support.prompts([19, 5, 12, 3])
    expected = [solo(session, prompt, 6) for prompt in prompts]
    tickets = [engine.submit(Job(prompt, 6)) for prompt in prompts]
    assert [[e.token for e in ticket] for ticket in tickets] == expected
    assert all(ticket.finish == "length" and ticket.done for ticket in tickets)
    stopped = list(engine.submit(Job(prompts[0], 6, frozenset({expected[0][2]}))))
    assert [e.token for e in stopped] == expected[0][: expected[0].index(expected[0][2]) + 1]
    assert [e.finish for e in stopped] == [None] * (len(stopped) - 1) + ["stop"]
    assert (engine.slots, engine.ctx_len, engine.vocabulary) == (2, CTX, VOCAB)


def test_the_context_can_be_filled_to_the_last_token(session: Watched, engine: Engine) -> None:
    (prompt,) = support.prompts([CTX - 2])
    assert [e.token for e in engine.submit(Job(prompt, 3))] == solo(session, prompt, 3)
    with pytest.raises(RuntimeInputError, match="46 tokens and 4 new ones do not fit the compiled context of 48"):
        engine.submit(Job(prompt, 4))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job([], 1), "the prompt is empty"),
        (Job([5], 0), "max_new_tokens is 0"),
        (Job([5, VOCAB], 1), "a token is outside the vocabulary of 97"),
        (Job([-1], 1), "a token is outside"),
        (Job([5], 1, adapter=1), "adapter is 1: give a slot of at most 0"),
        (Job([5], 1, sampling=Sampling(bias={VOCAB: 1.0})), "the bias has a token outside"),
    ],
)
def test_jobs_that_never_fit_are_refused(job: Job, message: str, engine: Engine) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        engine.submit(job)


def test_a_full_queue_refuses_and_takes_again(session: Watched, engine: Engine) -> None:
    session.gate.clear()
    tickets = [engine.submit(Job([5, number], 3)) for number in range(4)]  # two slots, two that wait
    with pytest.raises(EngineFullError, match="4 requests run and wait"):
        engine.submit(Job([5], 1))
    session.gate.set()
    assert all(len(list(ticket)) == 3 for ticket in tickets)
    assert len(list(engine.submit(Job([5], 1)))) == 1


def test_a_job_that_is_taken_back_frees_its_slot(session: Watched, engine: Engine) -> None:
    """One at its first token, and one that waits."""
    told, tickets = list[Any](), list[Ticket]()

    def listen(emitted: Any) -> None:
        told.append(emitted)
        tickets[0].cancel()

    session.gate.clear()
    tickets += [engine.submit(Job([5, 6], 40), listen)]
    second, third = (engine.submit(Job([5, number], 40)) for number in range(2))
    third.cancel()
    session.gate.set()
    assert len(list(second)) == 40
    assert list(third) == []
    assert [emitted is None for emitted in told] == [False, True]
    assert (tickets[0].finish, third.finish) == ("cancelled", "cancelled")
    assert (tickets[0].error, third.error) == (None, None)
    assert len(list(engine.submit(Job([5], 2)))) == 2


def test_a_run_that_fails_fails_its_jobs_and_no_other(session: Watched, engine: Engine) -> None:
    (prompt,) = support.prompts([19])
    expected = solo(session, prompt, 4)
    assert [e.token for e in engine.submit(Job(prompt, 4))] == expected
    session.fails = 1
    with pytest.raises(PackageError, match="a run fails"):
        list(engine.submit(Job(prompt, 4)))
    again = engine.submit(Job(prompt, 4))
    assert [e.token for e in again] == expected
    assert again.cached == 0  # what the failed run has left in the slot is not used
    assert engine.stats().finished == 3


def test_a_constraint_that_fails_fails_its_job_alone(engine: Engine) -> None:
    class Broken:
        def mask(self) -> Array:
            raise RuntimeInputError("the grammar has no end")

        def advance(self, token: int) -> None: ...

    good, bad = engine.submit(Job([5, 6], 8)), engine.submit(Job([5, 7], 8, constraint=Broken()))
    with pytest.raises(RuntimeInputError, match="the grammar has no end"):
        list(bad)
    assert len(list(good)) == 8


def test_a_listener_is_told_of_each_token_and_of_the_end(engine: Engine) -> None:
    told, ended = list[Any](), threading.Event()

    def listen(emitted: Any) -> None:
        told.append(emitted)
        if emitted is None or emitted.finish is not None:
            ended.set()

    engine.submit(Job([5, 6], 3), listen)
    assert ended.wait(20)
    assert [e.finish for e in told] == [None, None, "length"]


def test_closing_finishes_what_runs_or_ends_it(session: Watched) -> None:
    engine = Engine(session)
    tickets = [engine.submit(Job([5, number], 5)) for number in range(5)]
    engine.close()
    assert [len(list(ticket)) for ticket in tickets] == [5] * 5
    with pytest.raises(EngineClosedError, match="takes no more requests"):
        engine.submit(Job([5], 1))
    other = Engine(session)
    session.gate.clear()
    ticket = other.submit(Job([5], 40))
    closing = threading.Thread(target=lambda: other.close(drain=False))
    closing.start()
    session.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(EngineClosedError, match="was closed before"):
        list(ticket)


def batching(session: Any, **options: Any) -> Batching:
    rows = Rows(session)
    return Batching(rows, Prefixes(rows, **options))


def test_a_long_prompt_stops_the_others_for_one_chunk_at_most(session: Watched) -> None:
    """An answer has a token after each chunk of it, and a short prompt does not wait for its end."""
    runs = batching(session)
    order = list[str]()

    def add(name: str, tokens: list[int], new: int) -> None:
        runs.add(Ticket(Job(tokens, new), lambda _: order.append(name)))

    add("answer", [5, 6], 9)
    runs.step()
    add("long", support.prompts([40])[0], 1)
    while runs.step():
        pass
    kinds = [columns for _, columns in session.shapes]
    assert kinds == [CHUNK, 1, *[CHUNK, 1] * 5, 1, 1]
    assert order == ["answer"] * 6 + ["long"] + ["answer"] * 3
    order.clear()
    runs.rows.chunk_rows = 1  # as where rows of caches are named
    add("long", support.prompts([40], seed=8)[0], 1)
    runs.step()
    add("short", [9, 10], 1)
    while runs.step():
        pass
    assert order == ["short", "long"]


def test_what_was_computed_is_not_computed_again(session: Watched) -> None:
    runs = batching(session)
    (prompt,) = support.prompts([40])

    def ask(tokens: list[int]) -> tuple[int, int, list[int]]:
        found = list[int]()
        ticket = Ticket(Job(tokens, 3), lambda e: found.append(e.token) if e else None)
        before = len(session.shapes)
        runs.add(ticket)
        while runs.step():
            pass
        return ticket.cached, sum(c for _, c in session.shapes[before:] if c > 1), found

    assert ask(prompt)[:2] == (0, 40)
    cached, computed, found = ask([*prompt[:30], 7, 8])
    assert (cached, computed) == (24, 8)
    assert found == solo(session, [*prompt[:30], 7, 8], 3)
    runs.prefixes.forget(1)
    assert ask(prompt)[0] == 24
    runs.prefixes.forget(0)
    assert ask(prompt)[0] == 0


def test_a_beginning_is_copied_from_a_job_that_runs(session: Watched) -> None:
    runs = batching(session)
    (prompt,) = support.prompts([24])
    first, second = Ticket(Job(prompt, 20)), Ticket(Job([*prompt[:20], 5], 4, sampling=Sampling(logprobs=0)))
    runs.add(first)
    for _ in range(5):
        runs.step()
    runs.add(second)
    while runs.step():
        pass
    assert (first.cached, second.cached) == (0, 16)
    assert [e.token for e in first] == solo(session, prompt, 20)
    found, shares = list(second), list[float]()
    assert [e.token for e in found] == solo(session, [*prompt[:20], 5], 4, shares)
    np.testing.assert_allclose([e.logprob or 0.0 for e in found], shares, atol=1e-5)


def test_an_idle_row_has_a_slot_that_no_other_row_has(session: Watched) -> None:
    rows = Rows(session)
    logits = rows.run([Piece(1, [5, 6, 7], 0), Piece(0, [8], 0)])
    alone = rows.run([Piece(1, [5, 6, 7], 0)])
    np.testing.assert_array_equal(logits[:1], alone)


def test_a_package_of_one_row_has_one_slot(tmp_path: Path) -> None:
    decoder = support.plain_decoder("llama", "onnxruntime", prefill_seq_len=4, ctx_len=24)
    with Engine(decoder.session) as engine:
        assert engine.slots == 1
        tickets = [engine.submit(Job([5, number], 3)) for number in range(3)]
        assert [len(list(ticket)) for ticket in tickets] == [3] * 3
