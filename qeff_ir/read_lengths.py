"""In which lengths caches are read, by the rules that hosts of the AI 100 expect (AI 100 contract §3)."""

from __future__ import annotations

from collections.abc import Sequence

from backends.options import CompileOptions
from qeff_ir.errors import CompileError

LEAST = 1024
"""Shorter lengths save nothing."""
_STEP = 32
"""By what a length of prefill is lowered that is one of decode too: the compiler takes each in one phase only."""
_MOST = 5
_STARTS = ((32768, 4096, 4000), (65536, 8192, 8000))
_START = 16384, 16000
"""The first lengths of decode and of prefill, by the longest context that they are for."""


def read_lengths(options: CompileOptions) -> tuple[list[int], list[int]] | None:
    """The lengths of prefill and of decode runs, sorted and without a common one; `None` where all is to be read.

    The longest of decode is the whole context. That of prefill is a little less: no prompt fills the last slots. With a
    prefill of one token, all runs have the same lengths.

    Raises:
        CompileError: The context is too short for lengths of prefill that decode does not have.
    """
    prefill, decode = options.comp_ctx_lengths_prefill, options.comp_ctx_lengths_decode
    if not (prefill or decode or options.ccl_enabled):
        return None
    ctx_len, alike = options.ctx_len, options.prefill_seq_len == 1
    if not prefill and not decode:
        prefill, decode = _automatic(ctx_len, 2 * _MOST if alike else _MOST)
        prefill = decode if alike else prefill
    asked, wanted = _completed(prefill, ctx_len), _completed(decode, ctx_len)
    if alike:
        both = sorted({*asked, *wanted})
        return both, both
    lowered = {_lowered(length, wanted) for length in asked}
    if min(lowered) < options.prefill_seq_len:
        raise CompileError(
            f"a context of {ctx_len} tokens is too short for lengths of prefill beside {wanted} of decode: leave out "
            "ccl_enabled and comp_ctx_lengths_prefill and _decode, or raise ctx_len"
        )
    return sorted(lowered), wanted


def _automatic(ctx_len: int, most: int) -> tuple[list[int], list[int]]:
    """Lengths that double, for prefill and for decode."""
    if ctx_len <= 4 * LEAST:
        return [ctx_len], [ctx_len]
    decode, prefill = next(((d, p) for up_to, d, p in _STARTS if ctx_len <= up_to), _START)
    return [prefill << n for n in range(most - 1)], [decode << n for n in range(most - 1)]


def _completed(lengths: Sequence[int], ctx_len: int) -> list[int]:
    """Sorted, none too short to save anything, and the whole context at the end."""
    return sorted({min(max(length, LEAST), ctx_len) for length in (*lengths, ctx_len)})


def _lowered(length: int, taken: Sequence[int]) -> int:
    """The length, or the next multiple of 32 below it that is not taken."""
    while length in taken:
        length = (length - 1) // _STEP * _STEP
    return length
