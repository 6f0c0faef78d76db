"""What resident adapters cost: decode beside the base model, and beside PEFT in transformers."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model

from backends.base import CompileOptions
from backends.onnxruntime import BACKEND
from benchmarks import report
from benchmarks.contenders import Contender, Eager, Ours
from benchmarks.decode import Race, figures_of, random_model, run
from benchmarks.prepare import lowered
from passes.lora import Lora
from qeff_ir.compiler import specialize
from qeff_ir.frontend.weights import memory_weights
from qeff_ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder

RESIDENT = (0, 1, 8, 32)


def main(
    hidden: int = 768,
    layers: int = 12,
    heads: int = 12,
    intermediate: int = 3072,
    vocab: int = 32000,
    batch: int = 1,
    context: Annotated[int, typer.Option(help="tokens of each prompt")] = 100,
    new_tokens: int = 64,
    ctx_len: int = 1024,
    chunk: int = 128,
    rank: int = 16,
    targets: Annotated[str, typer.Option(help="adapted layers, as the pass lora takes them")] = "all-linear",
    threads: int = 2,
    rounds: int = 5,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the figures here")] = None,
) -> None:
    """Decode with 0, 1, 8 and 32 random adapters in the session, each row with one of its own, as far as there are."""
    race = Race(
        hidden, layers, heads, heads, intermediate, vocab, batch, context, new_tokens, ctx_len, chunk, threads, rounds
    )
    torch.set_num_threads(threads)
    model = random_model(race)
    rows = torch.randint(0, vocab, (batch, context), generator=torch.Generator().manual_seed(1)).tolist()
    options = CompileOptions(prefill_seq_len=chunk, ctx_len=ctx_len, batch_size=batch)
    module = lowered(model, memory_weights(model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders: list[Contender] = [_named(_open(module.clone(), options, None, folder / "base", threads), "base")]
        for count in RESIDENT:
            step = Lora(n=max(count, 1), rank=rank, targets=targets)
            decoder = _open(module.clone(), options, step, folder / str(count), threads)
            _fill(decoder, count)
            contenders.append(_named(decoder, f"{count} resident adapters"))
        contenders.append(Eager(model))
        contenders.append(_peft(random_model(race), rank, targets))  # a model of its own, which PEFT changes
        laps = run(contenders, rows, new_tokens, rounds)
    figures = figures_of(laps)
    title = f"lora: rank {rank}, {targets}, batch {batch}, {context} tokens of context, {threads} threads, float32"
    report.table(title, figures, "equal steps: only the base model and no adapters must be equal to the first line")
    report.write_json(json, "lora", {**asdict(race), "rank": rank, "targets": targets}, figures)
    report.bars(plot, title, figures, "contender", ["tokens/s", "first token ms"])


def _open(module: Module, options: CompileOptions, step: Lora | None, folder: Path, threads: int) -> Decoder:
    pipeline = Pipeline.parse(BACKEND.pipeline)
    specialize(module, options)
    run_pipeline(module, pipeline if step is None else pipeline.insert_after("last-logits", step))
    folder.mkdir()
    BACKEND.emit(module, folder, options)
    return Decoder(BACKEND.open(folder, threads=threads))


def _fill(decoder: Decoder, count: int) -> None:
    """Write random adapters into the slots from 1 on, and give each row the next one."""
    rng = np.random.default_rng(0)
    for item in decoder.session.adapters:
        for slot in range(1, count + 1):
            decoder.session.write(item.name, rng.standard_normal(item.shape[1:], dtype=np.float32) * 0.01, slot)
    if count:
        decoder.lora_ids[:] = 1 + np.arange(decoder.batch_size) % count


def _named(decoder: Decoder, what: str) -> Ours:
    ours = Ours(decoder)
    ours.name = f"qeff-ir, {what}"
    return ours


def _peft(model: Any, rank: int, targets: str) -> Eager:
    names = targets if targets == "all-linear" else targets.split(",")
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=names, init_lora_weights=False)
    contender = Eager(get_peft_model(model, config).eval())  # pyright: ignore[reportArgumentType]
    contender.name = "transformers, PEFT, one adapter"
    return contender
