"""What the AI 100 contract says of tokens that are drawn on the device (§1.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from backends.ai100.violation import Violation

# Written out again: this module checks what the others make, and shares no names with them.
TABLES = ("past_repetition_penalty_buffer", "past_presence_penalty_buffer")
"""Tables of bits that the device keeps."""
_MASK, _NUMBERS = "token_bitmasks", "random_numbers"
DRAWS: dict[str, type[np.generic]] = {
    "last_accepted_output_tokens": np.int64,
    TABLES[0]: np.bool_,
    "repetition_penalties": np.float32,
    TABLES[1]: np.bool_,
    "presence_penalties": np.float32,
    "temperatures": np.float32,
    "top_ks": np.int32,
    "top_ps": np.float32,
    "min_ps": np.float32,
    _NUMBERS: np.float32,
    _MASK: np.bool_,
}
"""What a draw is given behind all other inputs of a run, in order, with its type; the last one may be left out."""
_PROBABILITIES, _TOKENS = "probs", "next_tokens"


def drawn(outputs: Mapping[str, Any]) -> list[str]:
    """What stands in the place of the logits; nothing where there are logits."""
    return [name for name in (_PROBABILITIES, _TOKENS) if name in outputs] if _TOKENS in outputs else []


def draw_interface(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Iterator[Violation]:
    """All inputs of a draw are there, or none, with their types and shapes; so are its outputs."""
    found = [name for name in DRAWS if name in inputs]
    missing = [name for name in DRAWS if name not in inputs and name != _MASK]
    if bool(found) != bool(drawn(outputs)) or (found and missing):
        what = missing[0] if found and missing else _TOKENS if found else next(iter(DRAWS))
        yield Violation("inputs", f"inputs of a draw and the output {_TOKENS} belong together: {what} is missing")
        return
    if not found:
        return
    kept: str | int = "num_logits_to_keep" if "num_logits_to_keep" in inputs else 1
    rows = "full_batch_size" if "batch_index" in inputs else "batch_size"
    vocabulary, width = ((list(inputs[name].shape or []) or [None])[-1] for name in (TABLES[0], _NUMBERS))
    if not isinstance(vocabulary, int) or not isinstance(width, int) or width > vocabulary:
        yield Violation("dtype-shape", f"{_NUMBERS} has {width} numbers for each row, of {vocabulary} tokens to draw")
    shapes: dict[str, list[Any]] = {
        "last_accepted_output_tokens": ["batch_size", "seq_len"],
        TABLES[0]: [rows, vocabulary],
        TABLES[1]: [rows, vocabulary],
        _NUMBERS: ["batch_size", width] if kept == 1 else ["batch_size", kept, width],
        _MASK: ["batch_size", vocabulary],
    }
    wanted: list[tuple[str, Any, type[np.generic], list[Any]]] = [
        *((name, inputs[name], DRAWS[name], shapes.get(name, ["batch_size", 1])) for name in found),
        (_TOKENS, outputs[_TOKENS], np.int64, ["batch_size", kept, 1]),
    ]
    if _PROBABILITIES in outputs:
        wanted.append((_PROBABILITIES, outputs[_PROBABILITIES], np.float32, ["batch_size", kept, vocabulary]))
    for name, tensor, dtype, shape in wanted:
        if tensor.dtype != dtype or list(tensor.shape or []) != shape:
            sizes = ", ".join(map(str, shape))
            yield Violation(
                "dtype-shape", f"{name} is {tensor.dtype} {tensor.shape}, not {np.dtype(dtype).name} [{sizes}]"
            )
