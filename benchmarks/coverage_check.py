"""One architecture of the coverage benchmark, checked from configuration to logits."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

import torch
import transformers

from benchmarks.coverage_row import PASSED, Job, Row
from benchmarks.coverage_task import TASKS
from qeff_ir.errors import QeffError


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
    row, coverage = Row(job.name), TASKS[job.task].coverage()
    absent = coverage.absent()
    try:
        for file in job.files:
            _import(file)
        coverage.check(job, row, folder)
    except QeffError as error:
        row.reason = _first_line(error)
    except Exception as error:  # a model's own code raises anything, and that is a result
        place = traceback.extract_tb(error.__traceback__)[-1]
        row.reason = f"{type(error).__name__}: {_first_line(error)} ({Path(place.filename).name}:{place.lineno})"
    if row.result != PASSED and job.name in absent:
        row.result, row.reason = "absent", absent[job.name]
    return row


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
