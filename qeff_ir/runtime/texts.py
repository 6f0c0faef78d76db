"""From prompts to texts: any number of prompts, in batches of the compiled size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from qeff_ir.errors import RuntimeInputError, is_panic
from qeff_ir.ir.ports import CACHE_ROW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qeff_ir.runtime.decoder import Timings
    from qeff_ir.runtime.generation import SessionLM
    from qeff_ir.runtime.request import GenerationRequest


@dataclass(frozen=True)
class GenerationResult:
    """Texts and timings of a list of prompts.

    Attributes:
        generated_texts: The new text of each prompt.
        generated_ids: The new tokens of each prompt, its stop token included.
        timings: Of each batch that ran.
    """

    generated_texts: list[str]
    generated_ids: list[list[int]]
    timings: list[Timings]

    @property
    def time_to_first_token(self) -> float:
        """Mean seconds from the request to the first token's logits."""
        return sum(t.prefill for t in self.timings) / len(self.timings)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, all rows together; 0 when nothing was decoded."""
        seconds = sum(sum(t.steps) for t in self.timings)
        return sum(t.tokens for t in self.timings) / seconds if seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.generated_texts)} prompts, time to first token {self.time_to_first_token * 1e3:.1f} ms, "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


def generate_texts(
    runner: SessionLM,
    prompts: object,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: dict[str, Any],
    lora_ids: list[int] | None = None,
) -> GenerationResult:
    """Answer every prompt: over the slots of a session whose rows are chosen at each run, else see `answer_rows`.

    Args:
        runner: The session.
        prompts: A text, or at least one of them.
        tokenizer: The model's.
        kwargs: See `answer_rows`.
        lora_ids: Slot of each prompt's adapter; those of the decoder stay by default.

    Raises:
        RuntimeInputError: There is no prompt, or one of no token, or see `answer_rows`.
    """

    texts, rows = as_texts(prompts), list[list[int]]()
    if runner.decoder.session.interface.input(CACHE_ROW) is not None:
        from qeff_ir.runtime.many import unfit

        request = _read(runner, tokenizer, kwargs)
        if unfit(request) is None:  # else in batches: transformers' loop knows more settings
            rows.extend(encode(tokenizer, text) for text in texts)
            return _over_slots(runner, rows, request, tokenizer, lora_ids)

    def rows_of(batch: Sequence[int]) -> list[list[int]]:
        if not rows:  # all of them before the first answer, so that a wrong one is told at once
            rows.extend(encode(tokenizer, text) for text in texts)
        if lora_ids is not None:
            runner.decoder.lora_ids[:] = [lora_ids[number] for number in batch]
        return [rows[number] for number in batch]

    return answer_rows(runner, len(texts), rows_of, tokenizer, kwargs)


def answer_rows(
    runner: SessionLM,
    count: int,
    rows_of: Callable[[Sequence[int]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: dict[str, Any],
) -> GenerationResult:
    """Answer rows of token ids in batches; the last one is filled up with its last prompt, whose copies are dropped.

    Without a length in `kwargs` or the model's defaults, answers end with their stop token or with the context. The
    thread has its turn (`Decoder.request`) for all batches.

    Args:
        runner: The session.
        count: How many rows there are, at least one.
        rows_of: Makes those of a batch, by their numbers, and tells the decoder what they have beside tokens.
        tokenizer: The model's.
        kwargs: For transformers' ``generate``; ``num_return_sequences`` and tensors of one batch make no sense here.

    Raises:
        RuntimeInputError: A request does not fit the compiled model.
    """
    request = _read(runner, tokenizer, kwargs)
    size = runner.decoder.batch_size
    ids: list[list[int]] = []
    timings: list[Timings] = []
    for start in range(0, count, size):
        batch = [min(start + place, count - 1) for place in range(size)]
        ids += _run(runner, rows_of(batch), request)[: count - start]
        timings.append(runner.decoder.timings)
    return GenerationResult([_decode(tokenizer, i) for i in ids], ids, timings)


def _read(runner: SessionLM, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> GenerationRequest:
    """The settings of texts."""
    from qeff_ir.runtime.request import read, wish

    refused = [name for name in _OF_ONE_BATCH if kwargs.get(name) is not None]
    refused += [name for name in _BESIDE_TEXTS if wish(kwargs, name)]
    if refused or (wish(kwargs, "num_return_sequences") or 1) != 1:
        name = refused[0] if refused else "num_return_sequences"
        raise RuntimeInputError(f"prompts cannot be combined with {name}: give token ids instead of prompts")
    return read(runner, {**kwargs, "tokenizer": tokenizer}, ids_only=True)


def _over_slots(
    runner: SessionLM,
    rows: list[list[int]],
    request: GenerationRequest,
    tokenizer: PreTrainedTokenizerBase,
    lora_ids: Sequence[int] | None,
) -> GenerationResult:
    """Answer rows that come and go in the slots of one session, as one batch."""
    from qeff_ir.runtime.decoder import Timings
    from qeff_ir.runtime.many import answer_many

    answers = answer_many(runner, rows, request, adapters=lora_ids, to_the_end=True)
    for answer in answers:
        if answer.ticket.error is not None:
            raise answer.ticket.error
    first = [answer.times[0] - answer.started for answer in answers]
    whole = max(answer.times[-1] - answer.started for answer in answers)
    timings = Timings(sum(first) / len(first), [whole], sum(len(answer.tokens) for answer in answers))
    ids = [answer.tokens for answer in answers]
    return GenerationResult([_decode(tokenizer, i) for i in ids], ids, [timings])


_OF_ONE_BATCH = ("inputs", "input_ids", "attention_mask")
_BESIDE_TEXTS = ("output_scores", "output_logits")


def as_texts(prompts: object) -> list[str]:
    """One text, or any number of them, as a list.

    Raises:
        RuntimeInputError: It is something else, or is empty, or a text is not Unicode.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | bytearray | Mapping):
        raise RuntimeInputError(f"prompts is a {type(prompts).__name__}: give a text, or a list of texts")
    texts: list[str] = []
    for number, text in enumerate(cast("Iterable[object]", prompts)):
        if not isinstance(text, str):
            raise RuntimeInputError(f"prompt {number} is a {type(text).__name__}: give a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RuntimeInputError(f"prompt {number} cannot be read as Unicode ({error.reason}): repair it") from error
        texts.append(text)
    if not texts:
        raise RuntimeInputError("there is no prompt: give at least one")
    return texts


@contextlib.contextmanager
def tokenizing(what: str) -> Generator[None]:
    """A block in which a tokenizer works: tokenizers raise whatever their many kinds raise.

    Args:
        what: What it works on, for the message.

    Raises:
        RuntimeInputError: In place of any error of the tokenizer.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise RuntimeInputError(f"the tokenizer fails on {what}: {said}") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text, with the special tokens of the tokenizer or without.

    Raises:
        RuntimeInputError: There are none, or the tokenizer fails.
    """
    with tokenizing(f"the prompt {text[:40]!r}"):
        # Not named where it is what is done anyway: a tokenizer of one's own may take a text alone.
        made = (tokenizer(text) if special else tokenizer(text, add_special_tokens=False))["input_ids"]
        row = [int(token) for token in made]  # pyright: ignore[reportArgumentType]
    if not row:
        raise RuntimeInputError(f"the prompt {text!r} has no token: give some text")
    return row


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    with tokenizing("the answer"):
        return str(tokenizer.decode(ids, skip_special_tokens=True))


def _run(runner: SessionLM, rows: list[list[int]], request: GenerationRequest) -> list[list[int]]:
    """The new tokens of each row, its stop token included and what fills it up not."""
    import torch

    width = max(map(len, rows))
    pad = request.pad if request.pad is not None and 0 <= request.pad < runner.vocabulary else 0
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    answer = runner.answer(request, ids, mask, to_the_end=True)
    new: list[list[int]] = answer.sequences[:, width:].tolist()
    return [row[:length] for row, length in zip(new, answer.lengths, strict=True)]
