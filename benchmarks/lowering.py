"""What depth costs: lowering of a shallow and a deep model of one width, and a model that fits no laptop's memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.forms import FORMS
from benchmarks.options import Json, Plot, Quick, Runs, Target
from benchmarks.result import Figure, Result, Row, figure, publish
from benchmarks.shapes import SHAPES, Shape, config, probe
from benchmarks.sparse_checkpoint import write_checkpoint

Checkpoint = Annotated[Literal["f32", "bf16", "f16", "awq", "fp8"], typer.Option(help="Form of the checkpoints.")]


def main(
    target: Target = "onnxruntime",
    checkpoint: Checkpoint = "f32",
    runs: Runs = 1,
    json: Json = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Lower, run the passes and emit, each model in a fresh process, from sharded checkpoints full of holes."""
    publish(measure(target, runs, quick, checkpoint), json, plot)


def measure(target: str, runs: int, quick: bool, checkpoint: str = "f32") -> Result:
    """Measure; models take turns, so that whatever else the machine does hits all alike."""
    width = SHAPES["tiny"] if quick else {**SHAPES["7B"], "kv_heads": 8}
    models: dict[str, Shape] = {f"qeff-ir, {n} layers": {**width, "layers": n} for n in ((2, 8) if quick else (4, 80))}
    if not quick:
        models["qeff-ir, 70B"] = SHAPES["70B"]
    with tempfile.TemporaryDirectory() as name:
        for index, shape in enumerate(models.values()):
            folder = Path(name) / str(index)
            folder.mkdir()
            write_checkpoint(config(shape), folder, form=FORMS[checkpoint], shards=4 if quick else 30)
        rounds = [[probe(Path(name) / str(i), target) for i in range(len(models))] for _ in range(runs)]
    rows = [Row(n, _figures([taken[i] for taken in rounds])) for i, n in enumerate(models)]
    inner, whole = ([row.figures[name].median for row in rows[:2]] for name in ("lower s", "lowered s"))
    note = (
        f"lower: {inner[1] / inner[0]:.2f} times the shallow model's time for the deep one; "
        f"from the start of the process: {whole[1] / whole[0]:.2f} times"
    )
    return Result("lowering", quick, {"target": target, "checkpoint": checkpoint}, rows, note)


def _figures(taken: list[dict[str, dict[str, Any]]]) -> dict[str, Figure]:
    stages = ("lower", "passes", "emit")
    return {
        "lowered s": figure(run["import"]["seconds"] + run["lower"]["seconds"] for run in taken),
        **{f"{stage} s": figure(run[stage]["seconds"] for run in taken) for stage in stages},
        "total s": figure(sum(run[stage]["seconds"] for stage in ("import", *stages)) for run in taken),
        "CPU s": figure(sum(run[stage]["cpu"] for stage in ("import", *stages)) for run in taken),
        "peak MB": figure(run["emit"]["peak MB"] for run in taken),
        "own MB": figure(run["emit"]["own"] / 1e6 for run in taken),
        "nodes": figure((run["passes"]["nodes"] for run in taken), "neither"),
    }
