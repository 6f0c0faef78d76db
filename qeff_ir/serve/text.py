"""From tokens to text while they come: whole characters, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qeff_ir.runtime.texts import tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no character yet."""


class Detokenizer:
    """The text of a row of tokens, piece by piece; all pieces together are the tokenizer's text of all tokens.

    What a token adds depends on the tokens just before it (spaces, bytes of one character), so it is the difference
    of two texts that begin at the piece before. Where bytes that are no character would change the text of whole ones
    before them, as SentencePiece's do, what was told stays.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._told = 0

    def add(self, token: int) -> str:
        """The text that is sure with one more token; nothing while a character is not whole."""
        self._tokens.append(token)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(_BROKEN):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return after[len(before) :]

    def rest(self) -> str:
        """What was held back, at the end."""
        before, after = self._texts()
        self._start = self._told = len(self._tokens)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """The text that was told and the one with all tokens, both from `_start` on."""
        return self._decoded(self._told), self._decoded(len(self._tokens))

    def _decoded(self, end: int) -> str:
        with tokenizing("the answer"):
            return str(self._tokenizer.decode(self._tokens[self._start : end], skip_special_tokens=True))


class StopStrings:
    """Text up to the first of some strings; what may be the beginning of one is held back.

    Args:
        strings: Any number of texts that end an answer.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.met = False

    def add(self, text: str) -> str:
        """The text that is sure with some more; once a string was `met`, all before it."""
        self._held += text
        found = [at for at in (self._held.find(string) for string in self._strings) if at >= 0]
        if found:
            self.met = True
            sure, self._held = self._held[: min(found)], ""
            return sure
        keep = max((self._overlap(string) for string in self._strings), default=0)
        end = len(self._held) - keep
        sure, self._held = self._held[:end], self._held[end:]
        return sure

    def rest(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, string: str) -> int:
        """Characters at the end of the held text that a string begins with."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
