"""The lengths in which caches are read, by the rules of the contract (§3)."""

from __future__ import annotations

from typing import Any

import pytest

from backends.options import CompileOptions, completed
from qeff_ir.errors import CompileError
from qeff_ir.read_lengths import read_lengths


@pytest.mark.parametrize(
    ("ctx_len", "asked", "prefill", "decode"),
    [
        (4096, {"ccl_enabled": True}, [4064], [4096]),
        (8192, {"ccl_enabled": True}, [4000, 8000, 8160], [4096, 8192]),
        (32768, {"ccl_enabled": True}, [4000, 8000, 16000, 32000, 32736], [4096, 8192, 16384, 32768]),
        (65536, {"ccl_enabled": True}, [8000, 16000, 32000, 64000, 65504], [8192, 16384, 32768, 65536]),
        (131072, {"ccl_enabled": True}, [16000, 32000, 64000, 128000, 131040], [16384, 32768, 65536, 131072]),
        (5000, {"comp_ctx_lengths_decode": "[512, 3000]"}, [4992], [1024, 3000, 5000]),
        (5000, {"comp_ctx_lengths_prefill": (2000, 1000, 1000, 9000)}, [1024, 2000, 4992], [5000]),
        (4096, {"comp_ctx_lengths_prefill": [1024], "comp_ctx_lengths_decode": 1024}, [992, 4064], [1024, 4096]),
        (128, {"comp_ctx_lengths_prefill": [64], "comp_ctx_lengths_decode": [64]}, [96], [128]),
        (2048, {"prefill_seq_len": 1, "comp_ctx_lengths_prefill": [1500]}, [1500, 2048], [1500, 2048]),
    ],
)
def test_lengths_cover_the_context_and_are_of_one_phase(
    ctx_len: int, asked: dict[str, Any], prefill: list[int], decode: list[int]
) -> None:
    given = completed({"ctx_len": ctx_len, "prefill_seq_len": 32, **asked})
    assert read_lengths(CompileOptions(**given)) == (prefill, decode)
    assert prefill == decode or not set(prefill) & set(decode)


def test_one_token_at_a_time_has_up_to_ten_lengths() -> None:
    found = read_lengths(CompileOptions(ctx_len=1 << 23, prefill_seq_len=1, ccl_enabled=True))
    assert found is not None and found[0] == found[1]
    assert found[0] == [*(16384 << n for n in range(9)), 1 << 23]


def test_all_is_read_where_nothing_is_asked() -> None:
    assert read_lengths(CompileOptions(ctx_len=8192)) is None


def test_a_context_that_is_too_short_is_told() -> None:
    with pytest.raises(CompileError, match=r"a context of 32 tokens is too short .* beside \[32\] of decode"):
        read_lengths(CompileOptions(ctx_len=32, ccl_enabled=True))
