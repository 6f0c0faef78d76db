"""ONNX Runtime GenAI, with the model that its own builder makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.peers.contender import Rows
from benchmarks.peers.silence import silence
from qeff_ir.demo import MODEL_FOLDER


class GenAI:
    """A generator over a cache of fixed size, updated in place.

    Args:
        model: The model.
        ctx_len: Tokens that the cache has room for.
        threads: Threads of the session.
        folder: Where to put the built model.

    Raises:
        RuntimeError: The builder failed.
    """

    name = "ONNX Runtime GenAI"

    def __init__(self, model: PreTrainedModel, ctx_len: int, threads: int, folder: Path) -> None:
        import onnxruntime_genai  # pyright: ignore[reportMissingImports]

        self.genai: Any = onnxruntime_genai
        built = _build(model, folder)
        settings = json.loads((built / "genai_config.json").read_text())
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        (built / "genai_config.json").write_text(json.dumps(settings))
        self.model = self.genai.Model(str(built))
        self.ctx_len = ctx_len
        self.generator: Any = None

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.ctx_len, batch_size=len(rows), do_sample=False)
        self.generator = self.genai.Generator(self.model, parameters)
        return self._run(rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return self._run([[token] for token in tokens])

    def _run(self, rows: Rows) -> list[int]:
        self.generator.append_tokens(np.array(rows, dtype=np.int32))
        return np.asarray(self.generator.get_logits())[:, -1].argmax(-1).tolist()


def _build(model: PreTrainedModel, folder: Path) -> Path:
    """The model in the form of GenAI; the builder asks for a tokenizer, any, which the race does not use."""
    source, built = folder / "genai-source", folder / "genai"
    with silence():
        model.save_pretrained(source)
        AutoTokenizer.from_pretrained(MODEL_FOLDER).save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(built)]
    options = ["-p", "fp32", "-e", "cpu", "-c", str(folder / "genai-cache")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise RuntimeError(f"its builder failed: {last}")
    return built
