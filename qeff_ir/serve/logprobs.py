"""Log probabilities of tokens, as the two forms of answers have them in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qeff_ir.runtime.texts import tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token alone, special ones too; a replacement character where it is a part of one."""
    with tokenizing(f"the token {token}"):
        return str(tokenizer.decode([token], skip_special_tokens=False))
