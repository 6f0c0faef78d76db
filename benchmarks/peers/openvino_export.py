"""OpenVINO, by way of transformers' exporter for it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers.exporters.configs import OpenVINOConfig

from benchmarks.memory import resident
from benchmarks.peers.contender import Rows, titled
from benchmarks.peers.exported import export, inputs
from benchmarks.peers.silence import silence
from qeff_ir.arrays import Array

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""float32 throughout: on a processor that has bfloat16, OpenVINO computes in it whatever the export records."""

FAST = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
"""Activations of 8 bits in products with weights of few bits, as the other peers have them."""
MODES: dict[str, dict[str, Any]] = {"int8": {}, "int4": {"group_size": 32, "ratio": 1.0, "all_layers": True}}
"""What NNCF is asked for, beside symmetric weights: 8 bits by output feature, all it has; 4 bits in blocks of 32."""


class OpenVinoExport:
    """A stateful model: the cache stays inside the request, which forgets it between prompts.

    Args:
        model: The model.
        weights: Form of the weights: ``f32``, or a key of `MODES`.
        batch: Rows.
        threads: Threads of the compiled model.
    """

    name = "OpenVINO, transformers' exporter"
    before: int | None = None

    def __init__(self, model: PreTrainedModel, weights: str, batch: int, threads: int) -> None:
        self.name = titled(OpenVinoExport.name, weights)
        openvino: Any = importlib.import_module("openvino")
        exported: Any = export(model, OpenVINOConfig(), batch)
        program = exported.components["model"].program
        config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, **EXACT}
        if weights != "f32":
            with silence():
                program = _compressed(program, weights)
            config |= FAST
        self.before = resident()
        compiled = openvino.Core().compile_model(program, "CPU", config)
        self.request = compiled.create_infer_request()
        self.ports = {name for port in compiled.inputs for name in port.names}
        self.length = 0
        self._last: Array = np.zeros((batch, 1), np.float32)

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
        self._last = np.array(out["logits"][:, -1])
        return self._last.argmax(-1).tolist()

    def logits(self) -> Array:
        """See `benchmarks.faithful.Scores`."""
        return self._last


def _compressed(program: Any, weights: str) -> Any:
    """The program with weights of few bits, rounded to the nearest by NNCF."""
    nncf: Any = importlib.import_module("nncf")
    mode = getattr(nncf.CompressWeightsMode, f"{weights.upper()}_SYM")
    return nncf.compress_weights(program, mode=mode, **MODES[weights])
