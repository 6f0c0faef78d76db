"""OpenVINO, by way of transformers' exporter for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers.exporters.configs import OpenVINOConfig

from benchmarks.peers.contender import Rows
from benchmarks.peers.exported import export, inputs

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""float32 throughout: on a processor that has bfloat16, OpenVINO computes in it whatever the export records."""


class OpenVinoExport:
    """A stateful model: the cache stays inside the request, which forgets it between prompts.

    Args:
        model: The model.
        batch: Rows.
        threads: Threads of the compiled model.
    """

    name = "OpenVINO, transformers' exporter"

    def __init__(self, model: PreTrainedModel, batch: int, threads: int) -> None:
        exported = export(model, OpenVINOConfig(), batch)
        exported.to("cpu", config={"INFERENCE_NUM_THREADS": threads, **EXACT})
        runner: Any = exported.runners["model"]
        self.request = runner.request
        self.ports = {name for port in runner.compiled_model.inputs for name in port.names}
        self.length = 0

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.request.reset_state()
        self.length = 0
        return self._run(rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return self._run([[token] for token in tokens])

    def _run(self, rows: Rows) -> list[int]:
        # Not through the runner, which asks for the cache that it does not return.
        feed = {**inputs(rows, self.length), "beam_idx": np.arange(len(rows), dtype=np.int32)}
        self.length += len(rows[0])
        out = self.request.infer({n: np.asarray(v) for n, v in feed.items() if n in self.ports}, share_inputs=True)
        return out["logits"][:, -1].argmax(-1).tolist()
