"""Causal LMs: one trace through transformers, the onnxruntime session and the AI 100 emulator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from backends import backend_names
from backends.options import CompileOptions
from benchmarks.coverage_models import build, data, shrink, small_config
from benchmarks.coverage_row import Job, Row
from benchmarks.coverage_session import compiled
from benchmarks.coverage_task import Coverage
from qeff_ir import numerics
from qeff_ir.arrays import Array
from qeff_ir.frontend.checkpoint.config import read_config
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.versions import next_cache
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.testing.trace import compare, reference_trace, session_trace

OPTIONS = CompileOptions(prefill_seq_len=8, ctx_len=48, batch_size=2)
LENGTHS = (19, 5)
"""Longer than two chunks of eight, and shorter than one and than the windows."""
STEPS = 16


class CausalLMs(Coverage):
    """See `Coverage`; a job may be a folder or a registered architecture of the user's."""

    def architectures(self) -> list[str]:
        """See `Coverage.architectures`."""
        return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

    def absent(self) -> Mapping[str, str]:
        """See `Coverage.absent`."""
        return data()["absent"]

    def check(self, job: Job, row: Row, folder: Path) -> None:
        """See `Coverage.check`."""
        if job.folder is not None:
            config: Any = read_config(job.folder, job.trust)
            config = shrink(config, {"auto_map": config.auto_map} if hasattr(config, "auto_map") else {})
        else:
            config = small_config(job.name)
        check_causal(build(config, trust_remote_code=job.trust), row, folder)


COVERAGE = CausalLMs()


def check_causal(model: PreTrainedModel, row: Row, folder: Path) -> None:
    """Hold a small causal LM's answers against its own on every backend, see `Coverage.check`."""
    row.model = type(model).__name__
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 89, n).tolist() for n in LENGTHS]
    reference = reference_trace(model, prompts, STEPS)
    module = Source(Memory(model)).lower()
    row.nodes, row.states = len(module.graph), len(module.states)
    row.bound = numerics.bound(numerics.depth(module))
    row.allow(_rounding(model, prompts, reference.tokens))
    for target in backend_names():
        decoder = Decoder(compiled(module, target, folder / target, OPTIONS))
        row.hold(target, compare(session_trace(decoder, prompts, reference.tokens), reference))
    row.conclude()


def _rounding(model: PreTrainedModel, prompts: list[list[int]], tokens: Array) -> float:
    """Transformers' own ``max|error| / rms`` on the trace: the larger of what float64 and what its own cache changes.

    A computation that the model cannot do counts nothing.
    """
    rows = [torch.tensor([prompt + tokens[:-1, row].tolist()]) for row, prompt in enumerate(prompts)]
    with torch.no_grad():
        single = [model(row, use_cache=False).logits[0, -STEPS:].numpy() for row in rows]
        found = [
            _difference(single, lambda: _in_double(model, rows)),
            _difference(single, lambda: _cached(model, rows)),
        ]
    return max(found)


def _in_double(model: PreTrainedModel, rows: list[torch.Tensor]) -> list[Array]:
    exact = copy.deepcopy(model).double()
    return [exact(row, use_cache=False).logits[0, -STEPS:].numpy() for row in rows]


def _cached(model: PreTrainedModel, rows: list[torch.Tensor]) -> list[Array]:
    made: list[Array] = []
    for row in rows:
        start = row.shape[1] - STEPS + 1
        out, logits = model(row[:, :start], use_cache=True), []
        logits.append(out.logits[0, -1].numpy())
        for index in range(start, row.shape[1]):
            out = model(row[:, index : index + 1], use_cache=True, **next_cache(model, out))
            logits.append(out.logits[0, -1].numpy())
        made.append(np.stack(logits))
    return made


def _difference(single: list[Array], other: Callable[[], list[Array]]) -> float:
    try:
        pairs = list(zip(other(), single, strict=True))
    except Exception:
        return 0.0
    return max(numerics.error_over_rms(a[step], b[step]) for a, b in pairs for step in range(STEPS))
