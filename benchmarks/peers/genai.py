"""ONNX Runtime GenAI, with the model that its own builder makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, TokenizersBackend

from benchmarks.memory import resident
from benchmarks.peers.contender import Rows, titled
from benchmarks.peers.silence import silence

_BLOCKS = ("block_size=32", "accuracy_level=4", "is_symmetric=true")
PRECISIONS = {"f32": ("fp32",), "int8": ("int8", *_BLOCKS), "int4": ("int4", *_BLOCKS)}
"""What its builder is asked for: blocks of 32, activations of 8 bits in products, which is its fastest."""


class GenAI:
    """GenAI's own loop: greedy search over a cache of fixed size that is updated in place.

    Args:
        model: The model.
        weights: Form of the weights, a key of `PRECISIONS`.
        ctx_len: Tokens that the cache has room for.
        threads: Threads of the session.
        folder: Where to put the built model.

    Raises:
        RuntimeError: The builder failed.
    """

    name = "ONNX Runtime GenAI"
    before: int | None = None

    def __init__(self, model: PreTrainedModel, weights: str, ctx_len: int, threads: int, folder: Path) -> None:
        import onnxruntime_genai  # pyright: ignore[reportMissingImports]  # installed or not

        self.genai: Any = onnxruntime_genai
        self.name = titled(GenAI.name, weights)
        built = _build(model, weights, folder)
        file = built / "genai_config.json"
        settings = json.loads(file.read_text())
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        settings["model"]["eos_token_id"] = []  # nothing ends a race early
        file.write_text(json.dumps(settings))
        self.before = resident()
        self.model = self.genai.Model(str(built))
        self.ctx_len = ctx_len
        self.generator: Any = None
        self.last: list[int] = []

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        search = self.genai.GeneratorParams(self.model)
        search.set_search_options(max_length=self.ctx_len, batch_size=len(rows), do_sample=False)
        self.generator = self.genai.Generator(self.model, search)
        self.generator.append_tokens(np.array(rows, dtype=np.int32))
        return self._next()

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`; only what it generated itself can be appended.

        Raises:
            ValueError: The tokens are others.
        """
        if tokens != self.last:  # a batch of several rows takes no tokens from outside after its prompts
            raise ValueError(f"GenAI continues with what it generated, {self.last}: it cannot take {tokens}")
        return self._next()

    def _next(self) -> list[int]:
        self.generator.generate_next_token()
        self.last = self.generator.get_next_tokens().tolist()
        return self.last


def _build(model: PreTrainedModel, weights: str, folder: Path) -> Path:
    """The model in GenAI's form; the builder wants a tokenizer, which the race does not use."""
    source, built = folder / "genai-source", folder / f"genai-{weights}"
    with silence():
        model.save_pretrained(source)
        words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
        TokenizersBackend(tokenizer_object=words, unk_token="?").save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(built)]
    precision, *extra = PRECISIONS[weights]
    options = ["-p", precision, "-e", "cpu", "-c", str(folder / "genai-cache")]
    options += ["--extra_options", *extra] if extra else []
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it gave no reason")
        raise RuntimeError(f"its builder failed: {last.strip()}")
    return built
