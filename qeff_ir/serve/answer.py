"""One request's answers on their way: jobs of the engine become pieces of text on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.jobs import Emitted, Job, Listener, Sampling, Ticket
from qeff_ir.serve.errors import ApiError
from qeff_ir.serve.metrics import Metrics
from qeff_ir.serve.model import Writer
from qeff_ir.serve.schema import Generation
from qeff_ir.serve.text import Detokenizer, StopStrings


@dataclass(frozen=True)
class Piece:
    """What is new of one choice.

    Attributes:
        choice: Its number.
        text: Text that is sure.
        tokens: Tokens since the piece before; the text of the last ones may be held back.
        finish: ``stop`` or ``length`` with the last piece.
    """

    choice: int
    text: str
    tokens: Sequence[Emitted]
    finish: str | None = None


def jobs_of(
    writer: Writer, request: Generation, prompts: Sequence[list[int]], slot: int, most: int | None
) -> list[Job]:
    """The jobs of a request: `n` for each prompt, those of one prompt beside each other.

    Args:
        writer: The model.
        request: What was asked.
        prompts: Tokens of each prompt.
        slot: Of the adapter.
        most: New tokens of an answer; all that there is room for by default.

    Raises:
        ApiError: A prompt, a token or a length does not fit the model.
    """
    room = min(writer.engine.ctx_len + 1 - len(prompt) for prompt in prompts)
    if room < 1 or (most is not None and most > room):
        longest = max(map(len, prompts))
        new = "" if most is None else f" and {most} new ones"
        fits = f"do not fit the context of {writer.engine.ctx_len}: shorten one of them"
        raise ApiError(400, f"{longest} tokens of the prompt{new} {fits}", code="context_length_exceeded")
    bias = {_token(writer, name, "logit_bias"): value for name, value in request.logit_bias.items()}
    for token in (token for prompt in (*prompts, request.stop_token_ids) for token in prompt):
        _token(writer, token, "prompt or stop_token_ids")
    stops = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else writer.stop_tokens)
    constraints = writer.guide.constraints(request.response_format, len(prompts) * request.n)
    made: list[Job] = []
    for number, constraint in enumerate(constraints):
        sampling = Sampling(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=None if request.seed is None else request.seed + number % request.n,
            bias=bias,
            logprobs=request.alternatives,
        )
        prompt = prompts[number // request.n]
        made.append(Job(prompt, room if most is None else most, stops, sampling, slot, constraint))
    return made


def _token(writer: Writer, token: int | str, where: str) -> int:
    number = int(token) if isinstance(token, int) or token.isdecimal() else -1
    if not 0 <= number < writer.engine.vocabulary:
        raise ApiError(
            400, f"{where} has the token {token!r}: they are numbers from 0 to {writer.engine.vocabulary - 1}"
        )
    return number


@dataclass
class _Choice:
    """One answer, from its job to its end."""

    detokenizer: Detokenizer
    stops: StopStrings
    ticket: Ticket
    tokens: int = 0
    pending: list[Emitted] = field(default_factory=list[Emitted])
    ended: bool = False


class Answer:
    """The answers to one request.

    Args:
        writer: The model.
        jobs: One for each choice; all or none are taken.
        stops: Strings that end an answer.
        samples: Choices for each prompt.
        metrics: Told of tokens and times.

    Raises:
        EngineFullError: The queue of the engine has no room for all of them.

    Attributes:
        created: Seconds since 1970.
    """

    def __init__(
        self, writer: Writer, jobs: Sequence[Job], stops: Sequence[str], samples: int, metrics: Metrics
    ) -> None:
        self.created = int(time.time())
        self._jobs, self._samples, self._metrics = jobs, samples, metrics
        self._started = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Emitted | None]] = asyncio.Queue()
        self._choices: list[_Choice] = []
        try:
            for number, job in enumerate(jobs):
                ticket = writer.engine.submit(job, self._listener(number))
                self._choices.append(_Choice(Detokenizer(writer.tokenizer), StopStrings(stops), ticket))
        except BaseException:
            self.cancel()
            raise

    def _listener(self, number: int) -> Listener:
        """What the engine's thread calls with each token of a choice."""

        def hear(emitted: Emitted | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for the token
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (number, emitted))

        return hear

    def cancel(self) -> None:
        """Free the slots of all choices that have not ended."""
        for choice in self._choices:
            if not choice.ended:
                choice.ended = True
                choice.ticket.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come; the last of each has its finish.

        Raises:
            QeffError: The engine failed on a choice.
        """
        first = True
        while not all(choice.ended for choice in self._choices):
            number, emitted = await self._arrived.get()
            choice = self._choices[number]
            if choice.ended:
                continue
            if emitted is None:
                self.cancel()
                raise choice.ticket.error or RuntimeInputError("the request was cancelled: ask again")
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._started)
                first = False
            piece = self._piece(number, choice, emitted)
            if piece is not None:
                yield piece
        self._metrics.count(self.usage())

    async def choices(self) -> list[list[Piece]]:
        """The pieces of each choice, once all have ended.

        Raises:
            QeffError: As for `pieces`.
        """
        found = [list[Piece]() for _ in self._choices]
        async for piece in self.pieces():
            found[piece.choice].append(piece)
        return found

    def _piece(self, number: int, choice: _Choice, emitted: Emitted) -> Piece | None:
        choice.tokens += 1
        choice.pending.append(emitted)
        finish = emitted.finish
        # A token that ends the answer is no text of it.
        text = "" if finish == "stop" else choice.stops.add(choice.detokenizer.add(emitted.token))
        if choice.stops.met:
            finish = "stop"
            choice.ticket.cancel()
        elif finish is not None:
            text += choice.stops.add(choice.detokenizer.rest())
            text += choice.stops.rest()
            finish = "stop" if choice.stops.met else finish
        if not text and finish is None:
            return None
        choice.ended = finish is not None
        tokens, choice.pending = choice.pending, []
        return Piece(number, text, tokens, finish)

    def usage(self) -> dict[str, Any]:
        """``usage``: tokens of the prompts, those of them that were reused, and new ones."""
        firsts = range(0, len(self._jobs), self._samples)
        asked = sum(len(self._jobs[number].tokens) for number in firsts)
        cached = sum(self._choices[number].ticket.cached for number in firsts)
        new = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": asked,
            "completion_tokens": new,
            "total_tokens": asked + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
