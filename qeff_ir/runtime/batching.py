"""Continuous batching: jobs share the runs of a session, a chunk of a prompt and a token of each answer in turn."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import QeffError, RuntimeInputError
from qeff_ir.runtime import drawn
from qeff_ir.runtime.drawn import Drawn
from qeff_ir.runtime.jobs import Emitted, Job, Ticket
from qeff_ir.runtime.prefixes import Prefixes
from qeff_ir.runtime.rows import Piece, Rows
from qeff_ir.runtime.sampling import Chooser
from qeff_ir.runtime.speculation import Drafter


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine does and has done.

    Attributes:
        running: Jobs that have a slot.
        waiting: Jobs that wait for one.
        finished: Jobs that have ended, however they did.
        prompt_tokens: Tokens of the prompts of all jobs that got a slot.
        reused: Of these, tokens that were not computed anew.
        tokens: Tokens that came out.
        prefill_runs: Runs of chunks of prompts.
        decode_runs: Runs of one token for each row.
        busy: Seconds that runs of the session took.
        overhead: Seconds of all else between runs.
        drafted: Tokens of drafts that were verified.
        accepted: Of these, tokens that came out.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    reused: int = 0
    tokens: int = 0
    prefill_runs: int = 0
    decode_runs: int = 0
    busy: float = 0.0
    overhead: float = 0.0
    drafted: int = 0
    accepted: int = 0


class _Running:
    """A job in a slot.

    Attributes:
        ticket: What its tokens are told to.
        prompt: Its prompt, int64 ``[tokens]``.
        slot: Row of the caches.
        position: Tokens that the slot holds.
        left: Tokens that may still come.
        next: The token to append, once the prompt is read.
    """

    def __init__(self, ticket: Ticket, prompt: Array, slot: int, position: int, *, draws: bool) -> None:
        job = ticket.job
        self.ticket, self.prompt, self.slot, self.position = ticket, prompt, slot, position
        self.adapter, self.stops, self.left, self.next = job.adapter, job.stop_tokens, job.max_new_tokens, 0
        self.drawn = Drawn(job) if draws else None
        self.chooser = self.drawn or Chooser(job.sampling, job.tokens, job.constraint)


class Batching:
    """Jobs over the slots of a session, one run at a time; the thread that calls `step` drives it.

    Jobs get slots in the order in which they came. After each run of chunks of prompts comes one of a token for each
    answer, where there are both, and prompts take turns: no prompt, however long, stops another job for more than a
    chunk.

    Args:
        rows: The slots.
        prefixes: What is used again.
        drafter: Guesses what follows, where runs verify drafts.
    """

    def __init__(self, rows: Rows, prefixes: Prefixes, drafter: Drafter | None = None) -> None:
        self.rows, self.prefixes, self._drafter = rows, prefixes, drafter
        self._waiting = deque[Ticket]()
        self._reading = deque[_Running]()
        self._answering = list[_Running]()
        self._free = set(range(rows.slots))
        self._read_last = False
        self._finished = self._prompt_tokens = self._reused = self._tokens = 0
        self._prefill_runs = self._decode_runs = 0
        self._busy = self._overhead = 0.0
        self._drafted = self._accepted = 0

    def check(self, job: Job) -> None:
        """Refuse a job that can never run.

        Raises:
            RuntimeInputError: It has no token or one that there is not, does not fit the context, asks for no new
                token, for an adapter that there is no slot of, or for what a graph that draws does not do.
        """
        rows, size = self.rows, len(job.tokens)
        if size == 0:
            raise RuntimeInputError("the prompt is empty: give at least one token")
        if job.max_new_tokens < 1:
            raise RuntimeInputError(f"max_new_tokens is {job.max_new_tokens}: give a whole number of at least 1")
        if size + job.max_new_tokens - 1 > rows.ctx_len:  # the last token is only read out
            raise RuntimeInputError(
                f"a prompt of {size} tokens and {job.max_new_tokens} new ones do not fit the compiled context of "
                f"{rows.ctx_len}: compile with ctx_len={size + job.max_new_tokens} or more, or ask for fewer"
            )
        if min(job.tokens) < 0 or max(job.tokens) >= rows.vocabulary:
            raise RuntimeInputError(
                f"a token is outside the vocabulary of {rows.vocabulary}: use the model's tokenizer"
            )
        if any(not 0 <= token < rows.vocabulary for token in job.sampling.bias):
            raise RuntimeInputError(f"the bias has a token outside the vocabulary of {rows.vocabulary}")
        if not 0 <= job.adapter <= rows.adapters:
            raise RuntimeInputError(
                f"adapter is {job.adapter}: give a slot of at most {rows.adapters}, 0 for the base model"
            )
        if rows.draws:
            drawn.check(job, rows.top, guided=rows.guided, tells_prompts=rows.chunk > 1)

    def add(self, ticket: Ticket) -> None:
        """Let a job wait for a slot; it was checked."""
        self._waiting.append(ticket)

    @property
    def open(self) -> int:
        """Jobs that run or wait."""
        return len(self._waiting) + len(self._reading) + len(self._answering)

    def step(self) -> bool:
        """One run, of whatever is next.

        Returns:
            Whether there was one.
        """
        started, busy = time.perf_counter(), self._busy
        self._sweep()
        self._admit()
        ran = True
        if self._reading and not (self._answering and self._read_last):
            self._read()
        elif self._answering:
            self._answer()
        else:
            ran = False
        self._overhead += time.perf_counter() - started - (self._busy - busy)
        return ran

    def fail(self, error: QeffError) -> None:
        """End all jobs with an error."""
        for running in [*self._reading, *self._answering]:
            self._leave(running, error)
        for ticket in self._waiting:
            ticket.end(error)
            self._finished += 1
        self._waiting.clear()

    def stats(self) -> Stats:
        """See `Stats`."""
        running = len(self._reading) + len(self._answering)
        return Stats(
            running,
            len(self._waiting),
            self._finished,
            self._prompt_tokens,
            self._reused,
            self._tokens,
            self._prefill_runs,
            self._decode_runs,
            self._busy,
            self._overhead,
            self._drafted,
            self._accepted,
        )

    def _sweep(self) -> None:
        """Let go of jobs that were taken back."""
        for running in [r for r in (*self._reading, *self._answering) if r.ticket.cancelled]:
            self._leave(running)
        if any(ticket.cancelled for ticket in self._waiting):
            for ticket in [t for t in self._waiting if t.cancelled]:
                self._waiting.remove(ticket)
                ticket.end()
                self._finished += 1

    def _admit(self) -> None:
        """Give slots to those that wait, the first first."""
        while self._waiting and len(self._reading) + len(self._answering) < self.rows.width:
            ticket = self._waiting.popleft()
            prompt = np.asarray(ticket.job.tokens, dtype=np.int64)
            slot, held = self.prefixes.place(prompt, ticket.job.adapter, self._free)
            self._free.remove(slot)
            ticket.cached = held
            self._prompt_tokens += len(prompt)
            self._reused += held
            self._reading.append(_Running(ticket, prompt, slot, held, draws=self.rows.draws))

    def _read(self) -> None:
        """A chunk of each of the next prompts, as many as a run has rows; they then stand at the end of the line."""
        chunk, batch, pieces = self.rows.chunk, list[_Running](), list[Piece]()
        while self._reading and len(batch) < self.rows.chunk_rows:
            running = self._reading.popleft()
            start = running.position
            end = min(start - start % chunk + chunk, len(running.prompt))  # chunks end where they would without reuse
            tokens, draws = running.prompt[start:end], running.drawn if end == len(running.prompt) else None
            pieces.append(Piece(running.slot, tokens, start, running.adapter, reads=True, drawn=draws))
            batch.append(running)
        self._read_last = True
        self._prefill_runs += 1
        logits = self._run(batch, pieces)
        if logits is None:
            return
        done = [r.position == len(r.prompt) for r in batch]
        for running, ended in zip(batch, done, strict=True):
            self.prefixes.keep(running.slot)
            (self._answering if ended else self._reading).append(running)
        if any(done):
            self._choose([r for r, ended in zip(batch, done, strict=True) if ended], logits[done, 0])

    def _answer(self) -> None:
        """A token of each answer, and more where a draft is accepted."""
        self._read_last = False
        drafts = {running: self._drafted_for(running) for running in self._answering.copy()}
        batch = [running for running in drafts if running in self._answering]  # but those whose drafter has failed
        if not batch:
            return
        keep = 1 + max(len(drafts[running]) for running in batch)
        self._decode_runs += 1
        pieces = [Piece(r.slot, (r.next, *drafts[r]), r.position, r.adapter, drawn=r.drawn) for r in batch]
        logits = self._run(batch, pieces, keep)
        if logits is None:
            return
        if keep == 1:
            self._choose(batch, logits[:, 0])
            return
        for running, piece, scores in zip(batch, pieces, logits, strict=True):
            self._accept(running, piece, scores[keep - len(piece.tokens) :])

    def _drafted_for(self, running: _Running) -> Sequence[int]:
        """A draft of what follows the token that is next; it fits what may still come, and the slot."""
        if self._drafter is None:
            return ()
        most = min(self.rows.drafts, running.left - 1, self.rows.ctx_len - running.position - 1)
        if most < 1:
            return ()
        known = np.append(self.prefixes.held(running.slot), running.next)
        try:
            return self._drafter.draft(known, most, running.slot)[:most]
        except QeffError as error:
            self._leave(running, error)
            return ()

    def _accept(self, running: _Running, piece: Piece, logits: Array) -> None:
        """Choose tokens as long as the draft says the same; what is behind is taken back."""
        count = 0
        for token, scores in zip((*piece.tokens[1:], None), logits, strict=True):
            count += 1
            self._choose([running], scores[None])
            if running not in self._answering or running.next != token:
                break
        self._drafted += len(piece.tokens) - 1
        self._accepted += count - 1
        running.position = piece.start + count
        self.prefixes.hold(running.slot, piece.tokens[:count], piece.start)

    def _run(self, batch: Sequence[_Running], pieces: Sequence[Piece], keep: int = 1) -> Array | None:
        """The logits of a run, ``[pieces, keep, vocab]``; `None` for one that fails, and all its jobs with it."""
        started = time.perf_counter()
        try:
            logits = self.rows.verify(pieces, keep)
        except QeffError as error:
            for running in batch:
                self._leave(running, error)
                self.prefixes.drop(running.slot)
            return None
        finally:
            self._busy += time.perf_counter() - started
        for running, piece in zip(batch, pieces, strict=True):
            self.prefixes.hold(running.slot, piece.tokens, piece.start)
            running.position += len(piece.tokens)
        return logits

    def _choose(self, batch: Sequence[_Running], logits: Array) -> None:
        """The next token of each answer, told to its ticket."""
        for running, scores in zip(batch, logits, strict=True):
            try:
                token = running.chooser.choose(scores)
                told = running.chooser.told(scores, token)
            except QeffError as error:
                self._leave(running, error)
                continue
            running.next, running.left = token, running.left - 1
            self._tokens += 1
            finish = "stop" if token in running.stops else "length" if running.left == 0 else None
            if finish is not None:
                self._leave(running, ended=True)
            running.ticket.tell(Emitted(token, finish, *told))

    def _leave(self, running: _Running, error: QeffError | None = None, *, ended: bool = False) -> None:
        """Free the slot of a job, which keeps what it holds."""
        for line in (self._reading, self._answering):
            if running in line:
                line.remove(running)
        self._free.add(running.slot)
        self._finished += 1
        if not ended:
            running.ticket.end(error)
