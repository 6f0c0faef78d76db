"""What a decoder returns for the last token of each row of any number of rows: logits, or an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.texts import encode

if TYPE_CHECKING:
    import torch

    from qeff_ir.runtime.decoder import Decoder


def read_out(
    decoder: Decoder,
    count: int,
    rows_of: Callable[[Sequence[int]], list[list[int]]],
    lora_ids: Sequence[int] | None = None,
) -> Array:
    """Prefill rows in batches; the last batch is filled up with its last row, whose copies are dropped.

    Args:
        decoder: The session's driver, of which the thread has its turn.
        count: How many rows there are, at least one.
        rows_of: Makes the token ids of a batch, by their numbers, and tells the decoder what they have beside tokens.
        lora_ids: Slot of each row's adapter; those of the decoder by default.

    Returns:
        float32 ``[count, vocab]``, or ``[count, features]`` of an embedding model.

    Raises:
        RuntimeInputError: A row does not fit the compiled model.
    """
    found: list[Array] = []
    for start in range(0, count, decoder.batch_size):
        batch = [min(start + place, count - 1) for place in range(decoder.batch_size)]
        slots = None if lora_ids is None else np.array([lora_ids[number] for number in batch])
        found.append(decoder.prefill(rows_of(batch), slots)[: count - start].astype(np.float32))
    return np.concatenate(found)


def tensors(ids: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask as int64 tensors ``[rows, tokens]``.

    Args:
        ids: Token ids, as a tensor, an array or lists.
        mask: 1 for text and 0 for padding, of the same shape; text alone by default.

    Raises:
        RuntimeInputError: They are something else.
    """
    import torch

    from qeff_ir.runtime.generation import check_ids, check_mask

    given = check_ids(_tensor(ids))
    return given, torch.ones_like(given) if mask is None else check_mask(_tensor(mask), given)


def _tensor(value: Any) -> Any:
    """Arrays and lists as a tensor, where they make one; what is none is told by its check."""
    import torch

    try:
        return torch.as_tensor(value) if isinstance(value, np.ndarray | list | tuple) else value
    except (ValueError, TypeError, RuntimeError):  # rows of several lengths, or of no numbers
        return value


def real_rows(ids: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> list[list[int]]:
    """The tokens of each row that are no padding.

    Args:
        ids: See `tensors`.
        mask: See `tensors`.
        vocabulary: How many tokens there are.

    Raises:
        RuntimeInputError: A token is outside the vocabulary.
    """
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    if any(not 0 <= token < vocabulary for row in rows for token in row):
        raise RuntimeInputError(
            f"input_ids has a token outside the vocabulary of {vocabulary}: use the model's tokenizer"
        )
    return rows


def shares(logits: Array, tokens: Sequence[int | str], tokenizer: Any = None) -> Array:
    """How the probability of the next token is shared among some tokens, as rerankers are read ("yes" and "no").

    Args:
        logits: float32 ``[rows, vocab]``.
        tokens: Two or more, by id, or as texts of one token each.
        tokenizer: The model's, for texts.

    Returns:
        float32 ``[rows, tokens]``, each row of sum 1: the softmax over the logits of these tokens alone.

    Raises:
        RuntimeInputError: They are fewer than two, two are the same, or one is no token.
    """
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RuntimeInputError(f"tokens is {tokens!r}: give two or more in a list, ['no', 'yes'] say")
    ids = [_token(token, tokenizer, logits.shape[1]) for token in tokens]
    if len(ids) < 2 or len(set(ids)) < len(ids):
        raise RuntimeInputError(f"tokens is {list(tokens)!r}: give two or more that differ, ['no', 'yes'] say")
    chosen = logits[:, ids]
    powers = np.exp(chosen - chosen.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _token(token: object, tokenizer: Any, vocabulary: int) -> int:
    if isinstance(token, str):
        if tokenizer is None:
            raise RuntimeInputError(f"the token {token!r} is a text: give tokenizer= as well, or its id")
        found = encode(tokenizer, token, special=False)
        if len(found) != 1:
            raise RuntimeInputError(f"{token!r} is {len(found)} tokens: give a text of one token, or its id")
        if found[0] == getattr(tokenizer, "unk_token_id", None) and token != getattr(tokenizer, "unk_token", None):
            raise RuntimeInputError(f"the tokenizer does not know {token!r}: give a text of one token, or its id")
        return found[0]
    if type(token) is not int or not 0 <= token < vocabulary:
        raise RuntimeInputError(f"the token {token!r} is not in the vocabulary of {vocabulary}: give its id")
    return token
