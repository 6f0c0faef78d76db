"""What the checks of the pass manager cost, and how passes scale with depth: ratios of one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from backends.base import CompileOptions
from backends.onnxruntime import BACKEND
from benchmarks.prepare import lowered
from qeff_ir.compiler import specialize
from qeff_ir.frontend.weights import memory_weights
from qeff_ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline

_OPTIONS = CompileOptions(prefill_seq_len=8, ctx_len=48, batch_size=2)


def main(depths: str = typer.Option("8,32", help="Layers of the models, with commas."), repeats: int = 3) -> None:
    """Time the ONNX Runtime pipeline at check levels 0 to 2, on tiny llamas of several depths."""
    table = Table("layers", "nodes", "level 0", "ms/node", "level 1 / 0", "level 2 / 0")
    for depth in map(int, depths.split(",")):
        module = _llama(depth)
        times = [min(_timed(partial(_run, module, level)) for _ in range(repeats)) for level in (0, 1, 2)]
        nodes = len(module.graph)
        ratios = [f"{t / times[0]:.2f}" for t in times[1:]]
        table.add_row(str(depth), str(nodes), f"{times[0]:.2f} s", f"{times[0] / nodes * 1e3:.2f}", *ratios)
    Console().print(table)


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


def _run(module: Module, level: int) -> None:
    run_pipeline(module.clone(), Pipeline.parse(BACKEND.pipeline), check=level)


def _timed(work: Callable[[], None]) -> float:
    started = time.process_time()  # other processes share the machine
    work()
    return time.process_time() - started
