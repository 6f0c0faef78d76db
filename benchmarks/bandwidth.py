"""What memory allows: a decode step reads every weight once, so that bandwidth sets the tokens per second at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from qeff_ir.cost import cost
from qeff_ir.ir.module import Module, Specialization

_ROWS, _COLUMNS = 16384, 4096
"""Of the matrix that is read, float32: 256 MB, far more than caches hold."""

_RUNS = 8


def bandwidth(threads: int) -> float:
    """Bytes per second that threads read together, the best of several runs.

    A decode step is products with a vector, but some machines' libraries reach half of what memory gives with those; a
    sum does little else but read.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix, vector = torch.ones(_ROWS, _COLUMNS), torch.ones(_COLUMNS)
        reads: tuple[Callable[[], object], ...] = (lambda: torch.mv(matrix, vector), matrix.sum)
        return matrix.nbytes / min(_seconds(read) for read in reads for _ in range(_RUNS))
    finally:
        torch.set_num_threads(before)


def step_bytes(module: Module, batch: int, filled: int) -> float:
    """Bytes of weights and cache that one decode step must read, however a contender stores them.

    Args:
        module: The decoder as the frontend makes it: no pass has added anything yet.
        batch: Rows.
        filled: Tokens that the cache holds.
    """
    step = cost(module, Specialization("Decode", "decode", {"batch_size": batch, "ctx_len": filled, "seq_len": 1}))
    return step.weight_bytes + step.state_bytes


def _seconds(read: Callable[[], object]) -> float:
    started = time.perf_counter()
    read()
    return time.perf_counter() - started
