"""``/v1/completions``: texts or tokens, continued as they are."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from qeff_ir.runtime.jobs import Emitted
from qeff_ir.runtime.texts import as_texts, encode
from qeff_ir.serve.answer import Answer
from qeff_ir.serve.errors import ApiError
from qeff_ir.serve.logprobs import token_text
from qeff_ir.serve.schema import CompletionRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_TOKENS = 16
"""New tokens where the request does not say; OpenAI's own default."""


def prompts_of(request: CompletionRequest, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each prompt.

    Raises:
        ApiError: A prompt has none.
        RuntimeInputError: The tokenizer fails, or makes none.
    """
    made: list[list[int]] = []
    for prompt in request.prompt:
        row = encode(tokenizer, as_texts(prompt)[0]) if isinstance(prompt, str) else prompt
        if not row:
            raise ApiError(400, "a prompt has no token: give at least one", param="prompt")
        made.append(row)
    return made


def most_of(request: CompletionRequest) -> int:
    """New tokens at most."""
    return _DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens


class CompletionForm:
    """Answers as text completions; stream and whole have one form.

    Args:
        request: What was asked.
        answer: What comes.
        tokenizer: The model's.
    """

    def __init__(self, request: CompletionRequest, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._request, self._answer, self._tokenizer = request, answer, tokenizer
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": answer.created,
            "model": request.model,
        }
        self._offsets: dict[int, int] = {}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream."""
        async for piece in self._answer.pieces():
            yield {**self._head, "choices": [self._choice(piece.choice, piece.text, piece.finish, piece.tokens)]}
        if self._request.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": self._answer.usage()}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        made: list[dict[str, Any]] = []
        for number, pieces in enumerate(await self._answer.choices()):
            text = "".join(piece.text for piece in pieces)
            tokens = [token for piece in pieces for token in piece.tokens]
            made.append(self._choice(number, text, pieces[-1].finish, tokens))
        return {**self._head, "choices": made, "usage": self._answer.usage()}

    def _choice(self, number: int, text: str, finish: str | None, tokens: Sequence[Emitted]) -> dict[str, Any]:
        logprobs = None if self._request.logprobs is None else self._logprobs(number, tokens)
        return {"index": number, "text": text, "finish_reason": finish, "logprobs": logprobs}

    def _logprobs(self, number: int, tokens: Sequence[Emitted]) -> dict[str, Any]:
        """Lists with an entry for each token; an offset counts characters of the tokens before."""
        texts = [token_text(self._tokenizer, emitted.token) for emitted in tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offsets.get(number, 0))
            self._offsets[number] = offsets[-1] + len(text)
        tops = [
            {token_text(self._tokenizer, token): value for token, value in reversed(emitted.alternatives)}
            for emitted in tokens
        ]
        values = [emitted.logprob for emitted in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
