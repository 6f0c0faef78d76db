"""transformers' own exporters: ONNX with its fusions for ONNX Runtime, and OpenVINO."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters.auto import get_exporter_class, get_runner_class
from transformers.exporters.base import ExportedComponent
from transformers.exporters.configs import DynamoConfig, OnnxConfig, OpenVINOConfig

from benchmarks.peers.contender import Rows
from benchmarks.peers.silence import silence

_EXAMPLE = 8
"""Tokens of the prompts that an export is traced with; its sizes are symbols."""


class ExportedOnnx:
    """An export for ONNX Runtime: one graph for the prompt, one for what follows, and a cache that grows.

    Args:
        model: The model.
        rows: Prompts.
        threads: Threads of a session.
    """

    name = "transformers, ONNX exporter with fusions"

    def __init__(self, model: PreTrainedModel, rows: Rows, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        config = OnnxConfig(dynamic=True, ort_fusions="cpu")
        components = _export(model, rows, config)
        self.config = model.config
        self.graphs = {n: _runner(c, config, session_options=options) for n, c in components.items()}
        self.cache: Any = None
        self.length = 0

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache, self.length = DynamicCache(config=self.config), 0
        return self._run("prefill", rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return self._run("decode", [[token] for token in tokens])

    def _run(self, graph: str, rows: Rows) -> list[int]:
        ids, positions = _inputs(rows, self.length)
        out = self.graphs[graph](input_ids=ids, position_ids=positions, past_key_values=self.cache)
        self.cache, self.length = out.past_key_values, self.length + ids.shape[1]
        return out.logits[:, -1].argmax(-1).tolist()


class ExportedOpenVino:
    """An export for OpenVINO: one graph, whose cache is a state of its request.

    Args:
        model: The model.
        rows: Prompts.
        threads: Threads of a request.
    """

    name = "OpenVINO, transformers' exporter"

    def __init__(self, model: PreTrainedModel, rows: Rows, threads: int) -> None:
        config = OpenVINOConfig(dynamic=True)
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self.request = _runner(_export(model, rows, config)["decode"], config, config=properties).request
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
        ids, positions = _inputs(rows, self.length)
        self.length += ids.shape[1]
        order = torch.arange(len(rows), dtype=torch.int32)
        feed = {"input_ids": ids.numpy(), "position_ids": positions.numpy(), "beam_idx": order.numpy()}
        return self.request.infer(feed, share_inputs=True)["logits"][:, -1].argmax(-1).tolist()


def _export(model: PreTrainedModel, rows: Rows, config: DynamoConfig) -> dict[str, ExportedComponent]:
    ids = torch.tensor([row[:_EXAMPLE] for row in rows])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with silence():
        exporter: Any = get_exporter_class(config.export_format)()
        return exporter.export_for_generation(model, inputs, config, multi_token_decode=True).components


def _runner(component: ExportedComponent, form: DynamoConfig, **options: Any) -> Any:
    made: Any = get_runner_class(form.export_format)
    return made.from_program(component.program, component.metadata, "cpu", **options)


def _inputs(rows: Rows, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their positions, int64 ``[batch, tokens]``."""
    ids = torch.tensor(rows)
    return ids, (torch.arange(ids.shape[1]) + start).expand(len(rows), -1).contiguous()
