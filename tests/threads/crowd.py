"""Many threads at once, and what each of them asks."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qeff_ir import QEFFAutoModelForCausalLM
from tests import support

THREADS = 8
COUNT = int(os.environ.get("QEFF_THREADS_COUNT", "40"))
"""Generations of a scenario on one target; 500 in `python -m tests.threads`."""
TARGETS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"target": "onnxruntime"},
    "ai100": {"target": "ai100", "emit_only": True},
}
SHAPES: dict[str, Any] = {"batch_size": 1, "prefill_seq_len": 8, "ctx_len": 48}
ASK: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NAMES = ("llama", "qwen2")
PROMPTS = [torch.tensor([row]) for row in support.prompts(range(4, 20, 2), seed=11)]
"""One for each thread, of one to three chunks."""

Job = Callable[[], Any]
"""Asks something; returns anything but `None` or `True` when the answer is wrong."""


@contextmanager
def often_interrupted() -> Generator[None]:
    """Let threads change places a hundred times as often as usual, so that few requests show what many would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(jobs: Sequence[Sequence[Job]]) -> list[str]:
    """Run each list of jobs in a thread of its own, all at once; says what went wrong."""
    wrong: list[str] = []
    start = threading.Barrier(len(jobs))

    def work(mine: Sequence[Job]) -> None:
        start.wait()
        for job in mine:
            try:
                answer = job()
            except BaseException as error:
                wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
            else:
                if answer is not None and answer is not True:
                    wrong.append(f"another answer: {answer}")

    threads = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in jobs]
    with often_interrupted():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
    return wrong + ["a thread waits forever" for thread in threads if thread.is_alive()]


@functools.cache
def theirs(name: str, index: int) -> torch.Tensor:
    """What transformers answers to a prompt."""
    model: Any = support.tiny(name)[1]
    return model.generate(PROMPTS[index], **ASK)


@functools.cache
def compiled(name: str, target: str) -> QEFFAutoModelForCausalLM:
    """A compiled model."""
    model = QEFFAutoModelForCausalLM._opened(support.Lowered(name))
    model.compile(**TARGETS[target], **SHAPES)
    model.runner(threads=1)
    return model


def fresh(name: str, target: str, *, opened: bool = True) -> QEFFAutoModelForCausalLM:
    """The same in an object of its own."""
    model = QEFFAutoModelForCausalLM.from_package(compiled(name, target).package.folder)
    if opened:
        model.runner(threads=1)  # two cores have enough to do
    return model


def asking(model: QEFFAutoModelForCausalLM, name: str, index: int, count: int) -> list[Job]:
    """The same prompt, again and again."""

    def job() -> Any:
        found, wanted = model.generate(PROMPTS[index], **ASK), theirs(name, index)
        return torch.equal(found, wanted) or f"{found.tolist()}, not {wanted.tolist()}"

    theirs(name, index)
    return [job] * count
