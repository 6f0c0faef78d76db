"""What a package costs on disk and to open: bytes of its own, bytes shared with the checkpoint, seconds, memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.forms import FORMS
from benchmarks.options import Json, Plot, Quick, Runs
from benchmarks.result import Result, Row, figure, publish
from benchmarks.shapes import SHAPES, config, probe
from benchmarks.sparse_checkpoint import write_checkpoint

_FORMS = {"float32": "f32", "bfloat16": "bf16"}


def main(runs: Runs = 3, json: Json = None, plot: Plot = None, quick: Quick = False) -> None:
    """Emit packages of both targets from checkpoints of two element types."""
    publish(measure(1 if quick else runs, quick), json, plot)


def measure(runs: int, quick: bool) -> Result:
    """Measure, each run in a fresh process."""
    shape = SHAPES["tiny" if quick else "125M"]
    rows: list[Row] = []
    for dtype, form in _FORMS.items():
        if quick and dtype != "float32":
            continue
        for target in ("onnxruntime", "ai100"):
            with tempfile.TemporaryDirectory() as name:
                write_checkpoint(config(shape), Path(name), form=FORMS[form], shards=2)
                taken = [probe(Path(name), target, opened=target == "onnxruntime") for _ in range(runs)]
            figures = {
                "own MB": figure(run["emit"]["own"] / 1e6 for run in taken),
                "linked MB": figure((run["emit"]["linked"] / 1e6 for run in taken), "neither"),
                "emit s": figure(run["emit"]["seconds"] for run in taken),
                "peak MB": figure(run["emit"]["peak MB"] for run in taken),
            }
            if target == "onnxruntime":
                figures["open s"] = figure(run["open"]["seconds"] for run in taken)
            rows.append(Row(f"qeff-ir, {target}, {dtype} checkpoint", figures))
    return Result("package", quick, {"layers": shape["layers"], "hidden": shape["hidden"]}, rows)
