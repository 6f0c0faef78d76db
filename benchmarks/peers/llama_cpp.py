"""llama.cpp, by its own server in this process (the package xllamacpp)."""

from __future__ import annotations

import importlib
import queue
import threading
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from benchmarks.memory import resident
from benchmarks.peers.contender import Rows, titled
from benchmarks.peers.gguf_file import WORD, write_gguf

FORMS = {"f32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""GGUF's forms; those of few bits have blocks of 32."""
_PATIENCE = 600.0
"""Seconds after which a token does not come any more."""


class LlamaCpp:
    """A request that streams: the server goes on by itself, and `step` waits for the next token.

    The cache is float32 beside float32 weights, and float16 otherwise, as llama.cpp has it by default.

    Args:
        model: The model.
        weights: Form of the weights, a key of `FORMS`.
        rows: The prompts.
        ctx_len: Tokens that the cache has room for.
        threads: Threads of the server.
        folder: Where to put the GGUF file.

    Raises:
        ValueError: There are several prompts.
    """

    name = "llama.cpp"
    before: int | None = None

    def __init__(
        self, model: PreTrainedModel, weights: str, rows: Rows, ctx_len: int, threads: int, folder: Path
    ) -> None:
        if len(rows) > 1:
            raise ValueError("the race asks llama.cpp for one row only")
        package: Any = importlib.import_module("xllamacpp")
        file = folder / f"{weights}.gguf"
        write_gguf(model, file, FORMS[weights])
        # A wheel from the index is built for any processor: without what this one has, it is slower than it can be.
        built = "" if "AVX512 = 1" in package.get_system_info() else " built without AVX-512"
        self.name = titled(f"{LlamaCpp.name}{built}", weights)
        params = package.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = ctx_len, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_ram_mib, params.fit_params, params.verbosity = 0, False, -1
        if weights == "f32":
            params.cache_type_k = params.cache_type_v = package.ggml_type.GGML_TYPE_F32
        self.ctx_len = ctx_len
        self.before = resident()
        self.server = package.Server(params)
        self.tokens: queue.SimpleQueue[int | str] = queue.SimpleQueue()
        self.request: threading.Thread | None = None
        self.stopped = False

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.finish()
        self.tokens, self.stopped = queue.SimpleQueue(), False
        asked = {
            "prompt": rows[0], "n_predict": self.ctx_len - len(rows[0]) - 1, "temperature": 0.0, "ignore_eos": True,
            "cache_prompt": False, "stream": True,
        }  # fmt: skip
        self.request = threading.Thread(target=self.server.handle_completions, args=(asked, self._heard), daemon=True)
        self.request.start()
        return self._next()

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`; it goes on with its own tokens only."""
        return self._next()

    def finish(self) -> None:
        """See `RunsAhead.finish`."""
        self.stopped = True
        if self.request is not None:
            self.request.join()
            self.request = None

    def _heard(self, chunk: Any) -> bool:
        """Takes a piece of the answer; whether it was the last one that is wanted."""
        if "error" in chunk:
            self.tokens.put(str(chunk["error"]))
        for choice in chunk.get("choices", []):
            for number in choice["text"].split(WORD)[1:]:
                self.tokens.put(int(number))
        return self.stopped

    def _next(self) -> list[int]:
        token = self.tokens.get(timeout=_PATIENCE)
        if isinstance(token, str):
            raise RuntimeError(token)
        return [token]
