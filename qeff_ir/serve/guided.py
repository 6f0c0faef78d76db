"""Answers of a form: which tokens may come next, as llguidance knows it from a JSON schema."""

from __future__ import annotations

import functools
import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.serve.errors import ApiError
from qeff_ir.serve.schema import ResponseFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase


_COMPACT: Any = {"whitespace_flexible": False}
"""One space or none between parts: a model that begins with spaces may not stop."""


class Constraint:
    """One answer on its way through a grammar; see `qeff_ir.runtime.engine.Job`.

    Args:
        matcher: At the beginning.
        vocabulary: Tokens that the logits have; those that the tokenizer does not know are never allowed.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def mask(self) -> Array:
        """Whether each token may come next, bool ``[vocab]``.

        Raises:
            RuntimeInputError: The grammar is too complex to go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.zeros(self._vocabulary, dtype=bool)
        allowed = np.unpackbits(bits, bitorder="little", count=min(self._vocabulary, 8 * len(bits)))
        mask[: len(allowed)] = allowed
        return mask

    def advance(self, token: int) -> None:
        """Take a token.

        Raises:
            RuntimeInputError: It is not allowed, or the grammar is too complex to go on.
        """
        if not self._matcher.is_stopped():  # what follows the end is not looked at
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeInputError(f"response_format cannot be followed ({_first(self._matcher.get_error())})")


class Guide:
    """Makes constraints for one model.

    Args:
        tokenizer: The model's.
        vocabulary: Tokens that the logits have.
        stop_tokens: Those that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._stop_tokens = tokenizer, vocabulary, stop_tokens
        self._lock = threading.Lock()

    @functools.cached_property
    def _known(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        if not self._stop_tokens:
            raise ApiError(400, "the model has no token that ends an answer: leave response_format out")
        backend: Any = self._tokenizer
        try:
            return from_tokenizer(backend, n_vocab=self._vocabulary, eos_token=sorted(self._stop_tokens))
        except Exception as error:  # it raises what its Rust code says
            raise ApiError(400, f"answers of a form are not possible here ({_first(str(error))})") from error

    def constraints(self, form: ResponseFormat, count: int) -> list[Constraint | None]:
        """One constraint for each of some answers.

        Raises:
            ApiError: The schema cannot be followed, or the tokenizer cannot be used.
        """
        if form.type == "text":
            return [None] * count
        from llguidance import LLMatcher

        schema: dict[str, Any] = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
        with self._lock:
            known = self._known
        matcher = LLMatcher(
            known, LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT), log_level=0
        )
        if matcher.is_error():
            raise ApiError(
                400,
                f"the schema cannot be followed ({_first(matcher.get_error())}): simplify it",
                param="response_format",
            )
        return [Constraint(matcher.deep_copy(), self._vocabulary) for _ in range(count)]


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:200]
