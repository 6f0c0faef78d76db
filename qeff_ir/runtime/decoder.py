"""Chunked prefill and decode over a session: from rows of tokens to logits, with positions kept per row."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.ir.ports import ADAPTER_ROW, EMBEDDED, KEPT_LOGITS, LOGITS, NEXT_TOKENS, Run
from qeff_ir.runtime.runs import fitted, last
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.token_table import TokenTable
from qeff_ir.runtime.turns import Turns


@dataclass
class Timings:
    """Wall-clock seconds of one request.

    Attributes:
        prefill: Time to the first token's logits.
        steps: Each decode step.
        tokens: Tokens decoded in `steps`, all rows together.
    """

    prefill: float = 0.0
    steps: list[float] = field(default_factory=list[float])
    tokens: int = 0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second; 0 before the first step."""
        return self.tokens / sum(self.steps) if self.steps else 0.0


class Decoder:
    """Drives one session, which serves one request at a time.

    Several threads may share it. A `prefill` starts a request of the thread that calls it, and only this thread goes on
    with `decode`; whoever wants the session to itself until the last token writes::

        with decoder.request():  # others wait
            logits = decoder.prefill(rows)
            logits = decoder.decode(logits.argmax(axis=-1))

    Args:
        session: The session.
        table: Where to look up the tokens of a session that takes vectors.

    Raises:
        PackageError: No role says what to feed to an input, there are no logits, or those of all tokens, or a state is
            the host's to write, which only a subclass does.

    Attributes:
        batch_size: Rows of a request; of a decode run.
        prefill_len: Tokens per row of a prefill run.
        ctx_len: Positions that the cache has room for.
        positions: Position of the next token of each row; -1 for a row without a prompt.
        timings: Of the request since the last `prefill`.
        lora_ids: Slot of each row's adapter, int64 ``[batch]``, for a model with slots; 0 and less is the base model.
            It may change between two runs.
        turns: Whose request it is.
        embeds: Whether it returns the features of an embedding in the place of logits.
    """

    writes_states = False
    """Whether it writes the states that are the host's, such as rows of pictures."""
    returns = LOGITS
    """Role of the output that `prefill` and `decode` return for the last token of each row."""

    def __init__(self, session: Session, table: TokenTable | None = None) -> None:
        interface = session.interface
        theirs = [r for r in interface.residents if r.written_by_host and r.part is None]
        if theirs and not self.writes_states:
            pictures = theirs[0].shared
            raise PackageError(
                "the package is of a model of pictures and text: open it with QEFFAutoModelForImageTextToText"
                if pictures
                else "the package is of an encoder and a decoder: open it with QEFFAutoModelForSeq2SeqLM, or with "
                "QEFFAutoModelForSpeechSeq2Seq if it takes recordings"
            )
        unknown = next((port.name for port in interface.inputs if not port.is_fed), None)
        if unknown is not None:
            raise PackageError(
                f"no role says what to feed to the input {unknown} of the package: declare one in its pass"
            )
        returned = interface.output(self.returns)
        if returned is None and interface.output(NEXT_TOKENS) is not None:
            raise PackageError("the package returns tokens that it draws, and no logits: open it as a causal LM")
        if returned is None:
            raise PackageError("the package returns no logits, so that it is not that of a causal LM: compile one")
        if returned.shape[1:2] != (1,) and interface.input(KEPT_LOGITS) is None:
            raise PackageError("the package returns the logits of all tokens: put last-logits into the pipeline")
        self.session = session
        self._returned = returned.name
        self.embeds = returned.name == EMBEDDED
        self._table = table
        specializations = session.specializations
        prefill = [s for s in specializations if s.phase == "prefill"] or specializations
        self.batch_size = max(s.symbols["batch_size"] for s in specializations)
        self._alone = prefill[0].symbols["batch_size"] < self.batch_size  # one row of the caches after the other
        self.prefill_len = max(s.symbols["seq_len"] for s in prefill)
        sizes = specializations[0].symbols
        self.ctx_len = sizes["ctx_len" if "ctx_len" in sizes else "decoder_ctx_len"]  # the latter of contract §1.7
        self.positions = np.full(self.batch_size, -1, dtype=np.int64)
        self.timings = Timings()
        self.lora_ids = np.zeros(self.batch_size, dtype=np.int64)
        ids = interface.input(ADAPTER_ROW)
        self._takes_adapters = ids is not None
        baked = (ids.rows or 1) - 1 if ids is not None else 0
        self._slots = max((baked, *(r.slots for r in interface.residents)))
        self.turns = Turns()
        self._thread = 0

    def request(self) -> AbstractContextManager[object]:
        """The session for one request of this thread, for a `with` statement; other threads wait until its end.

        Raises:
            RuntimeInputError: A request of this thread is running.
        """
        return self.turns.take()

    @property
    def table(self) -> TokenTable | None:
        """Where the tokens of a session that takes vectors are looked up."""
        return self._table

    def leave(self) -> None:
        """Have nothing to continue: what the caches hold is about to be another's. The thread has the turn."""
        self.turns.note(None)
        self.positions = np.full(self.batch_size, -1, dtype=np.int64)

    def check_scores(self) -> None:
        """Refuse to read logits of an embedding model.

        Raises:
            RuntimeInputError: It returns features of an embedding.
        """
        if self.embeds:
            raise RuntimeInputError("the package returns embeddings, and no logits: open it with QEFFAutoModel")

    def prefill(self, rows: Sequence[Sequence[int]], lora_ids: Array | None = None) -> Array:
        """Forget everything and read the prompts.

        All rows end in the same last chunk, so that its logits are those of every row's last token: shorter rows idle
        in the first chunks, whose tokens are padding. Where a prefill run has one row, they are read one by one.

        Args:
            rows: Token ids of each row, as many rows as the batch has; an empty row stays idle.
            lora_ids: Adapters of this run; the decoder's by default.

        Returns:
            Logits of each row's last token, float32 ``[batch, vocab]``.

        Raises:
            RuntimeInputError: The number of rows is not the batch size, all are empty, or one exceeds the context.
        """
        self._check(rows)
        every = np.arange(self.batch_size)
        groups = [row for row in every[:, None] if len(rows[int(row[0])])] if self._alone else [every]
        runs = [self._chunks(rows, at) for at in groups]
        found: list[tuple[Array, Array]] = []
        with self.turns.join():
            started = time.perf_counter()
            self._thread = threading.get_ident()
            self.positions = np.full(self.batch_size, -1, dtype=np.int64)  # until there is something to continue
            self._begin()
            self.session.reset()
            for at, chunks in runs:
                logits = [self._run(ids, positions, lora_ids, at) for ids, positions in chunks]
                found.append((at, logits[-1]))
            self.positions = np.array([len(tokens) or -1 for tokens in rows], dtype=np.int64)
            self.timings = Timings(prefill=time.perf_counter() - started)
        if len(found) == 1 and len(found[0][0]) == self.batch_size:
            return found[0][1]
        whole = np.zeros((self.batch_size, found[0][1].shape[-1]), dtype=found[0][1].dtype)
        for at, logits in found:
            whole[at] = logits
        return whole

    def _chunks(self, rows: Sequence[Sequence[int]], at: Array) -> tuple[Array, list[tuple[Array, Array]]]:
        """The runs that read the prompts of some rows: these, and ids and positions of each, ``[rows, chunk]``."""
        chunk = self.prefill_len
        cuts = [self._cut(int(row), len(rows[row])) for row in at]
        chunks = max(map(len, cuts))
        ids = np.zeros((len(at), chunks * chunk), dtype=np.int64)
        positions = np.full_like(ids, -1)
        for place, row in enumerate(at):
            for number, (first, end) in enumerate(cuts[place], chunks - len(cuts[place])):
                columns = slice(number * chunk, number * chunk + end - first)
                ids[place, columns] = rows[row][first:end]
                positions[place, columns] = np.arange(first, end)
        starts = [slice(start, start + chunk) for start in range(0, chunks * chunk, chunk)]
        return at, [(ids[:, columns], positions[:, columns]) for columns in starts]

    def decode(self, tokens: Sequence[int] | Array, lora_ids: Array | None = None) -> Array:
        """Append one token to every row that has a prompt.

        Args:
            tokens: One id per row; those of idle rows are ignored.
            lora_ids: See `prefill`.

        Returns:
            Logits after the token, float32 ``[batch, vocab]``; those of idle rows mean nothing.

        Raises:
            RuntimeInputError: There is not one id per row, a row has no room left, there was no `prefill`, it failed,
                or another thread has called it since.
        """
        ids = np.asarray(tokens, dtype=np.int64).reshape(-1, 1)
        if len(ids) != self.batch_size:
            raise RuntimeInputError(
                f"there are {len(ids)} tokens for the {self.batch_size} rows of the batch: give one for each row"
            )
        with self.turns.join():
            return self._decode(ids, lora_ids)

    def _decode(self, tokens: Array, lora_ids: Array | None) -> Array:
        active = self.positions >= 0
        if not active.any():
            raise RuntimeInputError("there is nothing to continue: call prefill first")
        if self._thread != threading.get_ident():
            raise RuntimeInputError(
                "the request in this session is another thread's: prefill and decode in one thread, inside "
                "`with decoder.request():`"
            )
        if int(self.positions.max()) >= self.ctx_len:
            raise RuntimeInputError(
                f"the context of {self.ctx_len} tokens is full: compile with a larger ctx_len, or generate fewer tokens"
            )
        started = time.perf_counter()
        at = self.positions
        logits = self._run(tokens, at[:, None], lora_ids)
        self.positions = np.where(active, at + 1, -1)
        self.timings.steps.append(time.perf_counter() - started)
        self.timings.tokens += int(active.sum())
        return logits

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse prompts that do not fit, before the request that is running is left."""
        if len(rows) != self.batch_size:
            raise RuntimeInputError(
                f"the model is compiled for a batch of {self.batch_size}, but got {len(rows)} rows: "
                f"compile with batch_size={len(rows)}, or pass {self.batch_size}"
            )
        longest = max(map(len, rows))
        if longest == 0:
            raise RuntimeInputError("every prompt is empty: give at least one token")
        if longest > self.ctx_len:
            raise RuntimeInputError(
                f"a prompt has {longest} tokens, the model is compiled for a context of {self.ctx_len}: "
                f"compile with ctx_len={longest} or more"
            )

    def _begin(self) -> None:
        """Leave the request before; the prompts are checked and cut."""

    def _cut(self, row: int, length: int) -> list[tuple[int, int]]:
        """Where each part of a prompt of a row begins and ends, none longer than a prefill run."""
        return [(start, min(start + self.prefill_len, length)) for start in range(0, length, self.prefill_len)]

    def _wanted(self, run: Run) -> Run:
        """A run with what tells which compiled shapes take it."""
        return run

    def _told(self, run: Run) -> Run:
        """A run of compiled shapes with what a request gives beside tokens."""
        return run

    def _heard(self, outputs: Mapping[str, Array]) -> None:
        """Take note of what a run returned beside logits."""

    def _run(self, ids: Array, positions: Array, lora_ids: Array | None, rows: Array | None = None) -> Array:
        """Logits of each row's last token, ``[rows, vocab]``; `rows` of the caches are continued, all by default."""
        at = np.arange(self.batch_size) if rows is None else rows
        ids = np.where(positions < 0, 0, ids)  # whatever stands at padding: a look-up would still have to find it
        slots = np.zeros(self.batch_size, dtype=np.int64)
        if self._takes_adapters:
            slots = np.asarray(self.lora_ids if lora_ids is None else lora_ids)
            fits = slots.shape == (self.batch_size,) and np.issubdtype(slots.dtype, np.integer)
            if not fits or int(slots.max()) > self._slots:
                raise RuntimeInputError(
                    f"lora_ids is {slots.tolist()}: give {self.batch_size} numbers of at most {self._slots}, 0 "
                    "or less for the base model"
                )
            slots = slots.astype(np.int64)  # a copy: another thread may write meanwhile
        slots = slots[at]
        embed = None if self._table is None else self._table.vectors
        run = Run(ids, np.ascontiguousarray(positions), slots, at, embed)
        inputs = self.session.interface.inputs
        run = self._told(fitted(self._wanted(run), inputs, self.session.specializations))
        self.positions = np.full(self.batch_size, -1, dtype=np.int64)  # a run that fails leaves nothing to continue
        self.turns.note(self)
        outputs = self.session.run({port.name: port.feed(run) for port in inputs})
        self._heard(outputs)
        return last(outputs[self._returned], run)[:, 0]
