"""Where the time of the passes goes: seconds of each pass of a target's pipeline, on a model as deep as real ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.options import Json, Plot, Quick, Runs, Target
from benchmarks.result import Result, Row, figure, publish
from benchmarks.shapes import SHAPES, config, probe
from benchmarks.sparse_checkpoint import write_checkpoint


def main(
    target: Target = "onnxruntime", runs: Runs = 3, json: Json = None, plot: Plot = None, quick: Quick = False
) -> None:
    """Run the stock pipeline, checked as users run it, and time its passes."""
    publish(measure(target, 1 if quick else runs, quick), json, plot)


def measure(target: str, runs: int, quick: bool) -> Result:
    """Measure, each run in a fresh process."""
    shape = {**SHAPES["tiny"], "layers": 4 if quick else 32}
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(config(shape), Path(name), shards=2)
        taken = [probe(Path(name), target)["passes"] for _ in range(runs)]
    rows = [Row("qeff-ir, all passes", {"seconds": figure(run["seconds"] for run in taken)})]
    rows += [Row(id, {"seconds": figure(run["passes"][id] for run in taken)}) for id in taken[0]["passes"]]
    return Result("pipeline", quick, {"target": target, "layers": shape["layers"]}, rows)
