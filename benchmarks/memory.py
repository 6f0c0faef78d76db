"""Peak memory and time of compiling a model whose weights do not fit the laptop."""

from __future__ import annotations

import json as json_format
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import LlamaConfig

from benchmarks import memory_probe, report
from benchmarks.sparse_checkpoint import write_checkpoint


def main(
    hidden: int = 4096,
    layers: int = 32,
    heads: int = 32,
    intermediate: int = 11008,
    vocab: int = 32000,
    dtype: Annotated[str, typer.Option(help="of the checkpoint: F32, BF16 or F16")] = "F32",
    shards: int = 4,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the figures here")] = None,
) -> None:
    """Lower a Llama (7B parameters by default) from a checkpoint full of holes, beside what mere imports cost."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_checkpoint(config, folder, dtype=dtype, shards=shards)
        # Emitting a checkpoint of another element type writes the whole converted model: no hole stays one.
        last = "emit" if dtype == "F32" else "passes"
        stages = memory_probe.STAGES[: memory_probe.STAGES.index(last) + 1]
        figures = [_measure(folder, stage) for stage in stages]
    title = f"compile: {parameters / 1e9:.2f}B parameters, {dtype}, {layers} layers, {shards} files"
    note = "each line is a fresh process that runs all stages up to its own; seconds are those of the last stage"
    report.table(title, figures, note)
    settings = {"parameters": parameters, "dtype": dtype, "layers": layers, "shards": shards}
    report.write_json(json, "memory", settings, figures)
    report.bars(plot, title, figures, "stage", ["peak MB", "seconds"])


def _measure(folder: Path, stage: str) -> dict[str, Any]:
    """Run a fresh process up to a stage; its last line is the measurement."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory_probe", str(folder), stage]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the measurement of '{stage}' failed:\n{done.stderr[-2000:]}")
    return json_format.loads(done.stdout.splitlines()[-1])
