"""Who answers many requests at once: our engine, and transformers' own continuous batching."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from backends.onnxruntime.backend import BACKEND
from backends.options import CompileOptions
from benchmarks.ours import NAME
from benchmarks.peers.contender import Rows
from benchmarks.peers.silence import silence
from benchmarks.prepare import emit
from qeff_ir.ir.module import Module
from qeff_ir.runtime.engine import Engine, Stats
from qeff_ir.runtime.jobs import Emitted, Job

_PAGE = 32
"""Tokens of a page of transformers' cache."""
_BATCH_TOKENS = 512
"""Tokens that one of its runs takes, at most."""


@dataclass
class Reply:
    """One answer.

    Attributes:
        times: Seconds from the moment in which all requests came to each token.
        tokens: The tokens.
    """

    times: list[float] = field(default_factory=list[float])
    tokens: list[int] = field(default_factory=list[int])


class Batcher(Protocol):
    """One way to answer many requests."""

    name: str

    def answer(self, prompts: Rows, new_tokens: int) -> list[Reply]:
        """Answer prompts that come all at once, greedily, each with so many tokens."""
        ...


class OurEngine:
    """The engine over a package with a slot for each request.

    Args:
        module: As the frontend makes it; it is not changed.
        slots: Requests at once.
        chunk: Prompt tokens of one run.
        ctx_len: Positions of each slot.
        threads: Threads of the session.
        folder: Where to put the package; it is empty.
    """

    name = NAME

    def __init__(self, module: Module, slots: int, chunk: int, ctx_len: int, threads: int, folder: Path) -> None:
        options = CompileOptions(prefill_seq_len=chunk, ctx_len=ctx_len, full_batch_size=slots)
        emit(module.clone(), options, folder, edits=f"+continuous-batching{{rows={slots}}}")
        self.engine = Engine(BACKEND.open(folder, threads=threads), queue=4 * slots)

    def answer(self, prompts: Rows, new_tokens: int) -> list[Reply]:
        """See `Batcher.answer`."""
        replies, left = [Reply() for _ in prompts], threading.Semaphore(0)
        started = time.perf_counter()

        def listener(reply: Reply) -> Callable[[Emitted | None], None]:
            def hear(emitted: Emitted | None) -> None:
                if emitted is not None:
                    reply.times.append(time.perf_counter() - started)
                    reply.tokens.append(emitted.token)
                if emitted is None or emitted.finish is not None:
                    left.release()

            return hear

        for prompt, reply in zip(prompts, replies, strict=True):
            self.engine.submit(Job(prompt, new_tokens), listener(reply))
        for _ in prompts:
            left.acquire()
        while (stats := self.engine.stats()).running or stats.waiting:  # its counts follow the last token
            time.sleep(0.001)
        return replies

    def stats(self) -> Stats:
        """See `Engine.stats`."""
        return self.engine.stats()


class TransformersBatching:
    """transformers' ``generate_batch``; the manager is made anew for each call, and only its tokens are timed.

    Args:
        model: The model.
        most: Requests at once, at most.
        ctx_len: Positions of each request.
    """

    name = "transformers, generate_batch"

    def __init__(self, model: PreTrainedModel, most: int, ctx_len: int) -> None:
        self._model: Any = model
        pages = most * -(-ctx_len // _PAGE)
        # Without sizes, it takes nine tenths of the memory that is free.
        self._sizes = ContinuousBatchingConfig(page_size=_PAGE, num_blocks=pages, max_batch_tokens=_BATCH_TOKENS)

    def answer(self, prompts: Rows, new_tokens: int) -> list[Reply]:
        """See `Batcher.answer`; the clock starts with its first request.

        Raises:
            RuntimeError: A request has failed.
        """
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
        with silence(), torch.inference_mode():
            made = self._model.generate_batch(prompts, config, self._sizes, record_timestamps=True, warmup=False)
        outputs: Sequence[Any] = sorted(made.values(), key=lambda o: int(str(o.request_id).rpartition("_")[2]))
        failed = next((o.error for o in outputs if o.error is not None), None)
        if failed is not None or len(outputs) != len(prompts):
            raise RuntimeError(failed or "some requests got no answer")
        began = min(o.created_time for o in outputs)
        return [Reply([t - began for t in o.timestamps], list(o.generated_tokens)) for o in outputs]
