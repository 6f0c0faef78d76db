"""What memory allows: a decode step reads every weight once, so that bandwidth sets the tokens per second at most."""

from __future__ import annotations

import time

import torch

from qeff_ir.cost import cost
from qeff_ir.module import Module, Specialization

_ROWS, _COLUMNS = 16384, 4096
"""Of the matrix that is read, float32: 256 MB, far more than caches hold."""

_RUNS = 8


def bandwidth(threads: int) -> float:
    """Bytes per second that a matrix-vector product reads, the best of several runs: the work of a decode step."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix, vector = torch.ones(_ROWS, _COLUMNS), torch.ones(_COLUMNS)
        return matrix.nbytes / min(_seconds(matrix, vector) for _ in range(_RUNS))
    finally:
        torch.set_num_threads(before)


def step_bytes(module: Module, batch: int, filled: int) -> float:
    """Bytes of weights and cache that one decode step must read, however a contender stores them.

    Args:
        module: The decoder as the frontend makes it: no pass has added anything yet.
        batch: Rows.
        filled: Tokens that the cache holds.
    """
    step = cost(module, Specialization("Decode", {"batch_size": batch, "ctx_len": filled, "seq_len": 1}))
    return step.weight_bytes + step.state_bytes


def _seconds(matrix: torch.Tensor, vector: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mv(matrix, vector)
    return time.perf_counter() - started
