"""transformers' ONNX exporter, fused for ONNX Runtime and run by transformers' own runner."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters.configs import OnnxConfig

from benchmarks.memory import resident
from benchmarks.peers.contender import Rows
from benchmarks.peers.exported import export, inputs
from qeff_ir.frontend.versions import CACHE


class OnnxExport:
    """`GroupQueryAttention` over a cache that grows: each run takes it as inputs and returns a longer one.

    Args:
        model: The model.
        batch: Rows.
        threads: Threads of the session.
    """

    name = "transformers, ONNX exporter"
    before: int | None = None

    def __init__(self, model: PreTrainedModel, batch: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = export(model, OnnxConfig(ort_fusions="cpu"), batch)
        self.before = resident()
        self.model.to("cpu", session_options=options)
        self.config = model.config
        self.cache: Any = None

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache = self._empty(len(rows))
        return self._run(rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return self._run([[token] for token in tokens])

    def _run(self, rows: Rows) -> list[int]:
        out = self.model(**inputs(rows, self.cache.get_seq_length()), **{CACHE: self.cache})
        self.cache = getattr(out, CACHE)
        return out.logits[:, -1].argmax(-1).tolist()

    def _empty(self, batch: int) -> DynamicCache:
        """A cache without tokens, whose layers have their tensors all the same: the graph takes them as inputs."""
        cache, config = DynamicCache(config=self.config), self.config
        for index in range(len(cache.layers)):
            keys = torch.empty(batch, config.num_key_value_heads, 0, config.head_dim)
            cache.update(keys, keys.clone(), index)
        return cache
