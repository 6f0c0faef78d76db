"""The engine: many requests at once over one session, driven by one thread."""

from __future__ import annotations

from dataclasses import dataclass

from qeff_ir.runtime.jobs import Job, Listener, Ticket
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.token_table import TokenTable


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


class Engine:
    """Answers any number of jobs over one session.

    Jobs come and go while others run. Each has a slot, a row of the caches. A package whose graph takes the row of the
    caches that each row of a run continues has as many slots as its caches have rows; any other has as many as its runs
    have rows.

    Args:
        session: The session, for the engine alone.
        table: Where to look up the tokens of a session that takes vectors.
        queue: How many jobs may wait for a slot.
        prefixes: Whether what earlier jobs left in the caches is used again.

    Raises:
        PackageError: The package is not that of a causal LM.

    Attributes:
        slots: Jobs that run at once.
        ctx_len: Positions that the cache of each has room for.
        vocabulary: Tokens that there are logits of.
    """

    slots: int
    ctx_len: int
    vocabulary: int

    def __init__(
        self, session: Session, table: TokenTable | None = None, *, queue: int = 256, prefixes: bool = True
    ) -> None:
        raise NotImplementedError

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
        raise NotImplementedError

    def stats(self) -> Stats:
        """What it does and has done, all of one moment."""
        raise NotImplementedError

    def forget(self, adapter: int | None = None) -> None:
        """Use nothing again that earlier jobs left: those of one adapter, whose slot has got another, or of all."""
        raise NotImplementedError

    def close(self, *, drain: bool = True) -> None:
        """Take no more jobs, and return when the thread has ended.

        Args:
            drain: Finish what runs and what waits; otherwise those fail with `EngineClosedError`.
        """
        raise NotImplementedError
