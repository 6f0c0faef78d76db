"""One architecture of the coverage benchmark, checked from configuration to logits."""

from __future__ import annotations

import copy
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from backends import backend_names, find_backend
from backends.options import CompileOptions
from benchmarks.coverage_models import build, data, shrink, small_config
from benchmarks.coverage_row import PASSED, Job, Row
from qeff_ir import numerics
from qeff_ir.arrays import Array
from qeff_ir.errors import QeffError
from qeff_ir.frontend.checkpoint.config import read_config
from qeff_ir.frontend.source import MemorySource
from qeff_ir.frontend.versions import next_cache
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.specialize import specialize
from qeff_ir.testing.trace import compare, reference_trace, session_trace

OPTIONS = CompileOptions(prefill_seq_len=8, ctx_len=48, batch_size=2)
LENGTHS = (19, 5)
"""Longer than two chunks of eight, and shorter than one and than the windows."""
STEPS = 16
_ROUNDINGS = 4.0
"""How many times transformers' own rounding error ours may be, for models that are worse conditioned than the bound."""
_WORST = 16.0
"""And how many times the bound at most: a planted fault shows at a hundred times."""


def check(job: Job, folder: Path) -> Row:
    """Build, lower, compile for every backend, drive the trace.

    Args:
        job: What to check.
        folder: An empty folder for the packages.

    Returns:
        The row; whatever fails is its reason.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    row = Row(job.name)
    absent = data().get("absent", {})
    try:
        _check(job, row, folder)
    except QeffError as error:
        row.reason = _first_line(error)
    except Exception as error:  # a model's own code raises anything, and that is a result
        place = traceback.extract_tb(error.__traceback__)[-1]
        row.reason = f"{type(error).__name__}: {_first_line(error)} ({Path(place.filename).name}:{place.lineno})"
    if row.result != PASSED and job.name in absent:
        row.result, row.reason = "absent", absent[job.name]
    return row


def _check(job: Job, row: Row, folder: Path) -> None:
    for file in job.files:
        _import(file)
    if job.folder is not None:
        config: Any = read_config(job.folder, job.trust)
        config = shrink(config, {"auto_map": config.auto_map} if hasattr(config, "auto_map") else {})
    else:
        config = small_config(job.name)
    model = build(config, trust_remote_code=job.trust)
    row.model = type(model).__name__
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 89, n).tolist() for n in LENGTHS]
    reference = reference_trace(model, prompts, STEPS)
    module = MemorySource(model).lower()
    row.nodes, row.states = len(module.graph), len(module.states)
    row.bound = numerics.bound(numerics.depth(module))
    own = _ROUNDINGS * _rounding(model, prompts, reference.tokens)
    row.limit = min(max(row.bound, own), _WORST * row.bound)
    failures: list[str] = []
    for target in backend_names():
        backend, lowered = find_backend(target), module.clone()
        specialize(lowered, OPTIONS)
        run_pipeline(lowered, Pipeline.parse(backend.pipeline))
        backend.check(lowered, OPTIONS)
        backend.emit(lowered, folder / target, OPTIONS)
        decoder = Decoder(backend.open(folder / target, threads=1))
        comparison = compare(session_trace(decoder, prompts, reference.tokens), reference)
        row.error[target] = comparison.error
        if not comparison.equal(row.limit):
            failures.append(
                f"{target} differs by {comparison.error:.1e}, tokens agree for {comparison.agreement} steps"
            )
    row.reason = "; ".join(failures)
    row.result = "fail" if failures else PASSED


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


def _import(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise QeffError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return " ".join(line.split())[:300]
