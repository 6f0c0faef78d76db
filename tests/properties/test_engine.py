"""Jobs that come, go and share an engine's runs answer as the recipe alone (P16), on both targets."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from backends import backend_names, find_backend
from backends.options import CompileOptions
from qeff_ir import numerics
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.batching import Batching
from qeff_ir.runtime.jobs import Emitted, Job, Sampling, Ticket
from qeff_ir.runtime.prefixes import Prefixes
from qeff_ir.runtime.rows import Rows
from qeff_ir.specialize import specialize
from qeff_ir.testing.build import build
from qeff_ir.testing.recipe import Layer, Recipe, answer
from tests.examples.cache_rows import CacheRows
from tests.properties import scaled
from tests.properties.test_adapters import SLOTS, Adapters, added
from tests.properties.test_driver import RECIPES as OTHERS

RECIPES = {"full caches": Recipe((Layer(), Layer(experts=3)), kv_heads=2, group=2, rotary="half"), **OTHERS}
"""The first is the only one that can go back to any position."""
CHUNK, CTX, ROWS, CACHE_ROWS = 3, 17, 2, 3
ADAPTERS = Adapters("all-linear", (3, 1), (0, 1, 2), seed=1)
EVERY_ANSWER = Sampling(logprobs=0)


@functools.cache
def compiled(name: str, target: str, any_row: bool) -> tuple[Rows, Module, float]:
    """The slots, the module with adapters, and the largest error allowed; runs have two rows.

    With rows of caches that runs name, there are three, and a prefill run has one row.
    """
    module = build(RECIPES[name]).module
    limit = numerics.bound(numerics.depth(module))
    options = CompileOptions(prefill_seq_len=CHUNK, ctx_len=CTX, batch_size=ROWS)
    specialize(module, options)
    backend = find_backend(target)
    retained = str(backend.retains_adapters).lower()
    step = f'lora{{n={SLOTS} rank=3 targets="{ADAPTERS.targets}" retained={retained}}}'
    pipeline = Pipeline.parse(backend.pipeline).insert_after("last-logits", step)
    if any_row:
        pipeline = pipeline.insert_after("kv-retention", CacheRows(CACHE_ROWS))
    run_pipeline(module, pipeline)
    if any_row:
        module.specializations = [
            dataclasses.replace(s, symbols={**s.symbols, "batch_size": 1}) if s.phase == "prefill" else s
            for s in module.specializations
        ]
    with tempfile.TemporaryDirectory() as folder:
        backend.check(module, options)
        backend.emit(module, Path(folder), options)
        session = backend.open(Path(folder), threads=1)
    for slot in range(1, SLOTS + 1):
        for layer, parts in ADAPTERS.factors(module, slot).items():
            for part, numbers in zip(("a", "b"), parts, strict=True):
                (item,) = [i for i in module.adapters if (i.path, i.part) == (layer, part)]
                padded = np.zeros(item.sizes, np.float32)
                padded[: numbers.shape[0], : numbers.shape[1]] = numbers
                session.write(item.input, padded, slot)
    return Rows(session), module, limit


class Jobs(RuleBasedStateMachine):
    """What users do with one engine. Its caches hold what the jobs of earlier examples left."""

    @initialize(
        name=st.sampled_from([*RECIPES, "full caches"]),
        backend=st.sampled_from(backend_names()),
        any_row=st.booleans(),
        every=st.sampled_from([1, 4]),
        memory=st.sampled_from([1 << 24, 10_000]),
    )
    def open(self, name: str, backend: str, any_row: bool, every: int, memory: int) -> None:
        self.name = name
        self.rows, self.module, self.limit = compiled(name, backend, any_row)
        self.batching = Batching(self.rows, Prefixes(self.rows, every=every, memory=memory))
        self.jobs: list[tuple[Ticket, list[Emitted]]] = []
        assert (self.rows.slots, self.rows.chunk_rows) == ((CACHE_ROWS, 1) if any_row else (ROWS, ROWS))

    def add(self, tokens: list[int], new: int, adapter: int, stops: list[int]) -> None:
        job = Job(tokens, min(new, CTX - len(tokens) + 1), frozenset(stops), EVERY_ANSWER, adapter)
        self.batching.check(job)
        found = list[Emitted]()
        ticket = Ticket(job, lambda emitted: found.append(emitted) if emitted else None)
        self.batching.add(ticket)
        self.jobs.append((ticket, found))

    @rule(
        shared=st.integers(0, CTX),
        more=st.integers(0, CTX),
        family=st.integers(0, 1),
        seed=st.integers(0, 3),
        new=st.integers(1, 6),
        adapter=st.sampled_from([0, 0, 1, 2]),
        stops=st.lists(st.integers(0, 10), max_size=2),
    )
    def ask(self, shared: int, more: int, family: int, seed: int, new: int, adapter: int, stops: list[int]) -> None:
        """Prompts of two families, each with its beginning."""
        vocab = RECIPES[self.name].vocab
        begin = np.random.default_rng(100 + family).integers(0, vocab, CTX)[:shared].tolist()
        end = np.random.default_rng(seed).integers(0, vocab, CTX)[:more].tolist()
        self.add([*begin, *end][:CTX] or [family], new, adapter, stops)

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 99), more=st.integers(1, 4), new=st.integers(1, 4), other=st.booleans())
    def follow(self, number: int, more: int, new: int, other: bool) -> None:
        """A next turn: a prompt with its answer, and more; perhaps with another adapter."""
        ticket, found = self.jobs[number % len(self.jobs)]
        tokens = [*ticket.job.tokens, *(e.token for e in found), *range(more)][:CTX]
        self.add(tokens, new, (ticket.job.adapter + other) % (SLOTS + 1), [])

    @rule(steps=st.integers(1, 5))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.batching.step()

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 99))
    def cancel(self, number: int) -> None:
        self.jobs[number % len(self.jobs)][0].cancel()

    @rule()
    def forget(self) -> None:
        self.batching.prefixes.forget()

    def teardown(self) -> None:
        """Everything ends, and every answer is the recipe's."""
        if not hasattr(self, "batching"):
            return
        for _ in range(40 * len(self.jobs)):
            if not self.batching.step():
                break
        assert self.batching.open == 0
        for ticket, found in self.jobs:
            self.compare(ticket, found)

    def compare(self, ticket: Ticket, found: list[Emitted]) -> None:
        job, tokens = ticket.job, [e.token for e in found]
        assert ticket.done and ticket.error is None and ticket.cached < len(job.tokens)
        if ticket.finish == "cancelled":
            assert ticket.cancelled
        else:
            assert ticket.finish == ("stop" if tokens[-1] in job.stop_tokens else "length")
            assert tokens[-1] in job.stop_tokens or len(tokens) == job.max_new_tokens
            assert found[-1].finish == ticket.finish
        assert not any(t in job.stop_tokens for t in tokens[:-1])
        if not tokens:
            return
        row = [*job.tokens, *tokens[:-1]]
        exact = answer(RECIPES[self.name], row, added(self.module, ADAPTERS, job.adapter))[len(job.tokens) - 1 :]
        for logits, emitted in zip(exact, found, strict=True):
            slack = 4 * self.limit * float(np.sqrt(np.mean(logits**2)))
            share = logits[emitted.token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            assert logits[emitted.token] >= logits.max() - slack, f"{self.name}: {job} answered {tokens}"
            assert emitted.logprob is not None
            assert abs(emitted.logprob - share) <= slack, f"{self.name}: {job} has {emitted.logprob}, not {share}"


TestJobs = Jobs.TestCase
TestJobs.settings = settings(scaled(0.5), stateful_step_count=12)
