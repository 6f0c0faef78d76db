"""The engine: many requests at once over one session, driven by one thread."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from typing import Self

from qeff_ir.errors import PackageError, QeffError, RuntimeInputError
from qeff_ir.runtime.batching import Batching, Stats
from qeff_ir.runtime.jobs import EngineClosedError, EngineFullError, Job, Listener, Ticket
from qeff_ir.runtime.prefixes import Prefixes
from qeff_ir.runtime.rows import Rows
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.speculation import Drafter
from qeff_ir.runtime.token_table import TokenTable
from qeff_ir.runtime.turns import Turns


class Engine:
    """Answers any number of jobs over one session.

    Jobs come and go while others run. Each has a slot, a row of the caches. A package whose graph takes the row of the
    caches that each row of a run continues has as many slots as its caches have rows; any other has as many as its runs
    have rows.

    Args:
        session: The session; for the engine alone, where it has no `turns`.
        table: Where to look up the tokens of a session that takes vectors.
        queue: How many jobs may wait for a slot.
        prefixes: Whether what earlier jobs left in the caches is used again.
        turns: Those of the session, where others use it too: the engine has one as long as it has work, and uses
            nothing again if another has had one since.
        snapshot_every: Tokens between two snapshots of a prompt, of states that cannot go back (`Prefixes`).
        snapshot_bytes: Memory that they may take.
        drafter: Guesses what follows (`qeff_ir.runtime.speculation`); answers stay the same.

    Raises:
        PackageError: The package is not that of a causal LM, or see `Rows`; or there is a drafter, and it verifies no
            drafts.
        RuntimeInputError: The package returns features of an embedding, or fewer than no jobs may wait.

    Attributes:
        slots: Jobs that run at once.
        ctx_len: Positions that the cache of each has room for.
        vocabulary: Tokens that there are logits of.
    """

    def __init__(
        self,
        session: Session,
        table: TokenTable | None = None,
        *,
        queue: int = 256,
        prefixes: bool = True,
        turns: Turns | None = None,
        snapshot_every: int = 256,
        snapshot_bytes: int = 1 << 28,
        drafter: Drafter | None = None,
    ) -> None:
        if queue < 0:
            raise RuntimeInputError(f"queue is {queue}: give how many jobs may wait")
        rows = Rows(session, table)
        if drafter is not None and not rows.drafts:
            raise PackageError("the package verifies no drafts: compile with num_speculative_tokens")
        reused = Prefixes(rows, every=snapshot_every, memory=snapshot_bytes, enabled=prefixes)
        self.slots, self.ctx_len, self.vocabulary = rows.width, rows.ctx_len, rows.vocabulary
        self._batching, self._most = Batching(rows, reused, drafter), rows.width + queue
        self._new, self._open = deque[Ticket](), 0
        self._forgotten = list[int | None]()
        self._turns = turns or Turns()
        self._changed = threading.Condition()
        self._closing, self._draining = False, True
        self._stats = Stats()
        self._thread = threading.Thread(target=self._work, name="qeff-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, listener: Listener | None = None) -> Ticket:
        """Take a job; any thread may.

        Args:
            job: The job.
            listener: Who is told of its tokens, in place of iterating the ticket.

        Raises:
            EngineFullError: As many jobs wait as may.
            EngineClosedError: The engine is closed, or closes.
            RuntimeInputError: The job can never fit: its length, a token or its adapter.
        """
        self._batching.check(job)
        ticket = Ticket(job, listener)
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is closed: it takes no more requests")
            if self._open >= self._most:
                raise EngineFullError(f"{self._open} requests run and wait, and no more may: ask again later")
            self._open += 1
            self._new.append(ticket)
            self._changed.notify_all()
        return ticket

    def stats(self) -> Stats:
        """What it does and has done, all of one moment."""
        with self._changed:
            stats, new = self._stats, len(self._new)
        return replace(stats, waiting=stats.waiting + new)

    def forget(self, adapter: int | None = None) -> None:
        """Use nothing again that earlier jobs left: those of one adapter, whose slot has got another, or of all."""
        with self._changed:
            self._forgotten.append(adapter)

    def close(self, *, drain: bool = True) -> None:
        """Take no more jobs, and return when the thread has ended.

        Args:
            drain: Finish what runs and what waits; otherwise those fail with `EngineClosedError`.
        """
        with self._changed:
            self._closing = True
            self._draining = self._draining and drain
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        """The engine, to be closed at the end of a `with` block."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close it; after an error, without finishing what runs."""
        self.close(drain=kind is None)

    def _work(self) -> None:
        """Run what there is until it is closed."""
        try:
            while self._next():
                with self._turns.take():
                    if not self._turns.was(self):
                        self._batching.prefixes.forget()
                        self._turns.note(self)
                    while self._open and self._next():
                        self._batching.step()
                        self._note()
        except BaseException as error:  # whatever it is, nobody may wait forever
            self._end(QeffError(f"the engine has failed ({type(error).__name__}: {error}): open the model again"))
            raise
        self._end(EngineClosedError("the engine was closed before the request had ended"))

    def _next(self) -> bool:
        """Wait until there is something to do; `False` when it is time to end."""
        with self._changed:
            while not (self._open or self._closing):
                self._changed.wait()
            for adapter in self._forgotten:
                self._batching.prefixes.forget(adapter)
            self._forgotten.clear()
            while self._new:
                self._batching.add(self._new.popleft())
            return bool(self._open) and (self._draining or not self._closing)

    def _note(self) -> None:
        with self._changed:
            self._stats = self._batching.stats()
            self._open = self._batching.open + len(self._new)

    def _end(self, error: QeffError) -> None:
        with self._changed:
            self._closing = True
            while self._new:
                self._batching.add(self._new.popleft())
        self._batching.fail(error)
        self._note()
