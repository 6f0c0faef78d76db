"""Answers to any number of rows of token ids over the slots of a session, by transformers' settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.batching import Batching
from qeff_ir.runtime.jobs import Emitted, Job, Sampling, Ticket
from qeff_ir.runtime.prefixes import Prefixes
from qeff_ir.runtime.request import HONORED, GenerationRequest
from qeff_ir.runtime.rows import Rows

if TYPE_CHECKING:
    from qeff_ir.runtime.generation import SessionLM

_TAKEN = {
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "eos_token_id",
}  # fmt: skip
"""Fields that a job has a place for, or that ask for nothing of it."""
_NOTHING = {"typical_p": 1.0, "encoder_repetition_penalty": 1.0}
"""Values of the others that ask for nothing, beside those that are false."""


@dataclass
class Answered:
    """The answer to a row.

    Attributes:
        tokens: New tokens, a stop token included.
        logprobs: Log probability of each, where they are asked for.
        times: When each came, by `time.perf_counter`.
        started: When the rows were asked for, by the same.
        ticket: Its job.
    """

    ticket: Ticket
    started: float
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    times: list[float] = field(default_factory=list[float])


def unfit(request: GenerationRequest) -> str | None:
    """What of a request only transformers' own loop applies, by name; `None` where jobs of an engine answer alike."""
    given = [name for name, value in request.callbacks.items() if value and name not in ("tokenizer", "streamer")]
    if given:
        return given[0]
    others = {name: getattr(request.config, name) for name in sorted(HONORED - _TAKEN)}
    return next((name for name, value in others.items() if value and value != _NOTHING.get(name)), None)


def sampling_of(request: GenerationRequest, logprobs: int | None = None) -> Sampling:
    """The settings of a job. A sampled one gets its seed from torch's generator: `torch.manual_seed` repeats it.

    Raises:
        RuntimeInputError: A number is outside of its range.
    """
    config = request.config
    penalty = config.repetition_penalty if config.repetition_penalty is not None else 1.0
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty, logprobs=logprobs)
    temperature = 1.0 if config.temperature is None else config.temperature
    if not temperature > 0:
        raise RuntimeInputError(f"temperature is {temperature}: give more than 0, or do_sample=False")
    return Sampling(
        temperature=temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=penalty,
        seed=int(torch.randint(0, 2**62, ())),
        logprobs=logprobs,
    )


def answer_many(
    runner: SessionLM,
    rows: Sequence[Sequence[int]],
    request: GenerationRequest,
    *,
    adapters: Sequence[int] | None = None,
    logprobs: bool = False,
    to_the_end: bool = False,
) -> list[Answered]:
    """Answer rows over the slots of a session; those beyond them wait. For a thread that has its turn.

    Args:
        runner: The session.
        rows: Token ids of each row.
        request: The settings; a streamer is told of the tokens of a single row.
        adapters: Slot of each row's adapter; the base model by default.
        logprobs: Whether log probabilities are told.
        to_the_end: Without a length, go on until the context is full.

    Returns:
        The answers in the order of the rows, the copies of each (``num_return_sequences``) together.

    Raises:
        RuntimeInputError: A row does not fit, or a setting is not for jobs of an engine.
    """
    name = unfit(request)
    if name is not None:
        raise RuntimeInputError(
            f"{name} is not taken where requests share runs: leave it out, or use generate(input_ids)"
        )
    copies: int = request.config.num_return_sequences or 1
    streamer = request.callbacks.get("streamer")
    if streamer is not None and len(rows) * copies != 1:
        raise RuntimeInputError(f"a streamer is told of one row, and there are {len(rows) * copies}: give one prompt")
    slots = Rows(runner.decoder.session, runner.decoder.table)
    batching = Batching(slots, Prefixes(slots))
    started, answers = time.perf_counter(), list[Answered]()
    for number, row in enumerate(rows):
        if not row:
            raise RuntimeInputError(f"row {number} is empty: give at least one token")
        new = runner.new_tokens(request, torch.ones(1, len(row)), to_the_end)
        for _ in range(copies):
            sampling = sampling_of(request, 0 if logprobs else None)
            adapter = max(adapters[number], 0) if adapters is not None else 0
            job = Job(row, new, frozenset(request.stops), sampling, adapter)
            batching.check(job)
            answers.append(_asked(batching, job, started, streamer))
    if streamer is not None:
        streamer.put(torch.tensor([list(rows[0])]))
    runner.decoder.leave()
    while batching.step():
        pass
    if streamer is not None:
        streamer.end()
    return answers


def _asked(batching: Batching, job: Job, started: float, streamer: Any) -> Answered:
    """A job that waits, and its answer, which fills."""

    def listen(emitted: Emitted | None) -> None:
        if emitted is None:
            return
        answer.tokens.append(emitted.token)
        answer.times.append(time.perf_counter())
        if emitted.logprob is not None:
            answer.logprobs.append(emitted.logprob)
        if streamer is not None:
            streamer.put(torch.tensor([emitted.token]))

    ticket = Ticket(job, listen)
    answer = Answered(ticket, started)
    batching.add(ticket)
    return answer
