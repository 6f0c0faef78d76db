"""Servers that run in a thread of a test's process, on ports of their own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qeff_ir.runtime.engine import Engine
from qeff_ir.runtime.jobs import Job, Listener, Ticket
from qeff_ir.serve.app import Limits, build_app
from qeff_ir.serve.model import Served
from qeff_ir.serve.server import Server, listen

NAME = "adds"


@dataclass(frozen=True)
class Running:
    """A server that runs in a thread of this process."""

    served: Served
    url: str
    server: Server

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def engine(self) -> Engine:
        assert self.served.writer is not None
        return self.served.writer.engine

    @property
    def running(self) -> int:
        """Requests that have a slot, or wait for one."""
        stats = self.engine.stats()
        return stats.running + stats.waiting


@contextlib.contextmanager
def running(served: Served, limits: Limits | None = None, drain: int = 20) -> Generator[Running]:
    """Serve until the end of the block; what runs then is finished."""
    listening = listen("127.0.0.1", 0)
    server = Server(build_app(served, limits), drain)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield Running(served, f"http://127.0.0.1:{listening.getsockname()[1]}", server)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def seen(engine: Engine) -> Generator[list[Ticket]]:
    """The tickets that an engine gives while the block runs."""
    tickets: list[Ticket] = []

    def submit(job: Job, listener: Listener | None = None) -> Ticket:
        tickets.append(Engine.submit(engine, job, listener))
        return tickets[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", submit)
        yield tickets


def wait_until(done: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.005)


def of_bytes() -> PreTrainedTokenizerFast:
    """Each token is a byte, so that most characters take several."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": len(vocabulary)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
