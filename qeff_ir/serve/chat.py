"""``/v1/chat/completions``: messages become a prompt by the model's own template."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from qeff_ir.runtime.jobs import Emitted
from qeff_ir.runtime.texts import encode, tokenizing
from qeff_ir.serve.answer import Answer
from qeff_ir.serve.errors import ApiError
from qeff_ir.serve.logprobs import token_text
from qeff_ir.serve.schema import ChatRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts_of(request: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of the one prompt.

    Raises:
        ApiError: The model has no template.
        RuntimeInputError: The template, or the tokenizer, does not take the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ApiError(400, "the model has no chat template: ask /v1/completions", param="messages")
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    for message in messages:
        if message["role"] == "developer":  # OpenAI's newer name
            message["role"] = "system"
    with tokenizing("the messages"):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return [encode(tokenizer, text, special=False)]


def most_of(request: ChatRequest) -> int | None:
    """New tokens at most; `None` for all that there is room for."""
    given = [most for most in (request.max_tokens, request.max_completion_tokens) if most is not None]
    return min(given, default=None)


class ChatForm:
    """Answers as chat completions.

    Args:
        request: What was asked.
        answer: What comes.
        tokenizer: The model's.
    """

    def __init__(self, request: ChatRequest, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._request, self._answer, self._tokenizer = request, answer, tokenizer
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": answer.created, "model": request.model}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream."""
        head = {**self._head, "object": "chat.completion.chunk"}
        begun: set[int] = set()
        async for piece in self._answer.pieces():
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if piece.choice not in begun:
                begun.add(piece.choice)
                delta = {"role": "assistant", "content": piece.text}
            yield {**head, "choices": [self._choice(piece.choice, piece.finish, piece.tokens) | {"delta": delta}]}
        if self._request.stream_options.include_usage:
            yield {**head, "choices": [], "usage": self._answer.usage()}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        made: list[dict[str, Any]] = []
        for number, pieces in enumerate(await self._answer.choices()):
            text = "".join(piece.text for piece in pieces)
            tokens = [token for piece in pieces for token in piece.tokens]
            message = {"role": "assistant", "content": text, "refusal": None}
            made.append(self._choice(number, pieces[-1].finish, tokens) | {"message": message})
        return {**self._head, "object": "chat.completion", "choices": made, "usage": self._answer.usage()}

    def _choice(self, number: int, finish: str | None, tokens: Sequence[Emitted]) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs:
            logprobs = {"content": [self._logprob(token) for token in tokens], "refusal": None}
        return {"index": number, "finish_reason": finish, "logprobs": logprobs}

    def _logprob(self, emitted: Emitted) -> dict[str, Any]:
        pairs = [(emitted.token, emitted.logprob), *emitted.alternatives]
        first, *others = (
            {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}
            for text, value in ((token_text(self._tokenizer, token), value) for token, value in pairs)
        )
        return {**first, "top_logprobs": others}
