"""What the checks of the pass manager cost, and how passes scale with depth: ratios of one run.

`growth` is the time for one node, relative to that of the first depth: 1 when the passes are linear.
"""

from __future__ import annotations

import gc
import statistics
import time

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from backends.onnxruntime.backend import BACKEND
from backends.options import CompileOptions
from benchmarks.options import Quick
from benchmarks.prepare import lowered
from qeff_ir.frontend.checkpoint.weights import memory_weights
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.specialize import specialize

_OPTIONS = CompileOptions(prefill_seq_len=8, ctx_len=48, batch_size=2)


_LEVELS = (0, 1, 2)


def main(
    depths: str = typer.Option("8,32,128", help="Layers of the models, with commas."),
    repeats: int = 3,
    quick: Quick = False,
) -> None:
    """Time the ONNX Runtime pipeline at check levels 0 to 2, on tiny llamas of several depths."""
    if quick:
        depths, repeats = "2,4", 1
    table = Table("layers", "nodes", *(f"level {n}" for n in _LEVELS), "1 / 0", "2 / 0", "level 1, ms/node", "growth")
    first: float | None = None
    for depth in map(int, depths.split(",")):
        module = _llama(depth)
        _timed(module, max(_LEVELS))  # imports, caches
        times = _medians(module, repeats)
        each = times[1] / len(module.graph) * 1e3
        first = first or each
        seconds = [f"{t:.2f} s" for t in times]
        ratios = [f"{t / times[0]:.2f}" for t in times[1:]]
        table.add_row(str(depth), str(len(module.graph)), *seconds, *ratios, f"{each:.3f}", f"{each / first:.2f}")
        Console(stderr=True).print(f"{depth} layers: {', '.join(seconds)}")
    Console().print(table)


def _medians(module: Module, repeats: int) -> list[float]:
    """The median time of each level, the levels taking turns: what slows the machine slows them all."""
    times = [[_timed(module, level) for level in _LEVELS] for _ in range(repeats)]
    return [statistics.median(of_level) for of_level in zip(*times, strict=True)]


def _llama(depth: int) -> Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    module = lowered(model, memory_weights(model))
    specialize(module, _OPTIONS)
    return module


def _timed(module: Module, level: int) -> float:
    copy, pipeline = module.clone(), Pipeline.parse(BACKEND.pipeline)
    gc.collect()  # what the run before left
    started = time.process_time()  # other processes share the machine
    run_pipeline(copy, pipeline, check=level)
    return time.process_time() - started
