"""``generate_batch`` as transformers has it: rows of token ids, and an output for each request by its id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.many import Answered, answer_many
from qeff_ir.runtime.request import read

if TYPE_CHECKING:
    from qeff_ir.runtime.generation import SessionLM


def as_rows(inputs: object) -> list[list[int]]:
    """Rows of token ids, of lists, arrays or tensors.

    Raises:
        RuntimeInputError: They are something else.
    """
    try:
        return [[int(token) for token in row] for row in cast("Iterable[Iterable[Any]]", inputs)]
    except (TypeError, ValueError) as error:
        raise RuntimeInputError(
            f"inputs is a {type(inputs).__name__}: give a list of rows, each a list of token ids"
        ) from error


def generate_rows(
    runner: SessionLM,
    rows: Sequence[Sequence[int]],
    settings: object,
    batching: object,
    kwargs: dict[str, Any],
    *,
    timestamps: bool = False,
    adapters: Sequence[int] | None = None,
) -> dict[str, GenerationOutput]:
    """Answer rows, for a thread that has its turn.

    Args:
        runner: The session.
        rows: Token ids of each.
        settings: A `GenerationConfig`, or `None` for the model's own.
        batching: A ``ContinuousBatchingConfig``, or `None`: whether it asks for log probabilities is all that counts.
        kwargs: Fields of a `GenerationConfig`, which go before it.
        timestamps: Whether outputs tell when each token came.
        adapters: Slot of each row's adapter.

    Returns:
        The outputs by id, ``req_0`` for the first row; copies (``num_return_sequences``) stand before it.

    Raises:
        RuntimeInputError: A row does not fit, or a setting is not for requests that share runs.
    """
    if "streamer" in kwargs:
        raise RuntimeInputError("streamer is not taken by generate_batch: use generate, or the tickets of engine()")
    request = read(runner, {**kwargs, "generation_config": settings}, ids_only=True)
    copies: int = request.config.num_return_sequences or 1
    logprobs = bool(getattr(batching, "return_logprobs", False))
    answers = answer_many(runner, rows, request, adapters=adapters, logprobs=logprobs)
    found: dict[str, GenerationOutput] = {}
    for number in range(len(rows)):
        names = [*(f"req_{number}__child#{copy}" for copy in range(copies - 1)), f"req_{number}"]
        for name, answer in zip(names, answers[number * copies :], strict=False):
            found[name] = _output(name, answer, timestamps=timestamps)
    return found


def _output(name: str, answer: Answered, *, timestamps: bool) -> GenerationOutput:
    error = answer.ticket.error
    return GenerationOutput(
        request_id=name,
        prompt_ids=list(answer.ticket.job.tokens),
        generated_tokens=answer.tokens,
        logprobs=answer.logprobs,
        error=None if error is None else str(error),
        status=RequestStatus.FINISHED if error is None else RequestStatus.FAILED,
        created_time=answer.started,
        lifespan=(answer.started, answer.times[-1] if answer.times else answer.started),
        timestamps=answer.times if timestamps else None,
    )
