"""What resident adapters cost: decode beside the base model, and beside PEFT in transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model

from backends.onnxruntime.backend import BACKEND
from backends.options import CompileOptions
from benchmarks.options import Json, Peers, Plot, Quick
from benchmarks.ours import Ours
from benchmarks.peers.contender import Entrant
from benchmarks.peers.eager import Eager
from benchmarks.prepare import lowered
from benchmarks.race import Batch, Context, NewTokens, Rounds, Sizes, Threads, rows_of, run
from benchmarks.result import Result, publish
from benchmarks.shapes import prompts, random_model
from passes.lora import Lora
from qeff_ir.frontend.checkpoint.weights import memory_weights
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.specialize import specialize

RESIDENT = (0, 1, 8, 32)
_CHUNK = 128


def main(
    shape: Sizes = "125M",
    context: Context = 100,
    batch: Batch = 1,
    new_tokens: NewTokens = 64,
    rank: Annotated[int, typer.Option(help="Of the adapters.", min=1)] = 16,
    targets: Annotated[str, typer.Option(help="Adapted layers, as the pass lora takes them.")] = "all-linear",
    threads: Threads = 2,
    rounds: Rounds = 5,
    peers: Peers = "all",
    json: Json = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Decode with 0, 1, 8 and 32 random adapters in the session, each row with one of its own, as far as there are."""
    if quick:
        shape, context, new_tokens, rounds = "tiny", 16, 8, 2
    torch.set_num_threads(threads)
    ctx_len = 2 ** (context + new_tokens).bit_length()
    model = random_model(shape, ctx_len)
    rows = prompts(shape, batch, context)
    options = CompileOptions(prefill_seq_len=min(_CHUNK, context), ctx_len=ctx_len, batch_size=batch)
    module = lowered(model, memory_weights(model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        racers = [_named(_open(module.clone(), options, None, folder / "base", threads), "base")]
        for count in RESIDENT[:2] if quick else RESIDENT:
            step = Lora(n=max(count, 1), rank=rank, targets=targets)
            decoder = _open(module.clone(), options, step, folder / str(count), threads)
            _fill(decoder, count)
            racers.append(_named(decoder, f"{count} resident adapters"))
        entrants = [Entrant(racer.name, racer) for racer in racers]
        if peers != "none":
            entrants.append(Entrant(Eager.name, Eager(model)))
            tuned = _peft(random_model(shape, ctx_len), rank, targets)  # a model of its own, which PEFT changes
            entrants.append(Entrant(tuned.name, tuned))
        laps = run([e.contender for e in entrants if e.contender is not None], rows, new_tokens, rounds)
    settings = {"shape": shape, "context": context, "new tokens": new_tokens, "batch": batch, "rank": rank}
    settings |= {"targets": targets, "threads": threads, "rounds": rounds}
    note = "equal steps: only the base model and no adapters must be equal to the first line"
    publish(Result("lora", quick, settings, rows_of("decode", entrants, laps, rows), note), json, plot)


def _open(module: Module, options: CompileOptions, step: Lora | None, folder: Path, threads: int) -> Decoder:
    pipeline = Pipeline.parse(BACKEND.pipeline)
    specialize(module, options)
    run_pipeline(module, pipeline if step is None else pipeline.add(step))
    folder.mkdir()
    BACKEND.emit(module, folder, options)
    return Decoder(BACKEND.open(folder, threads=threads))


def _fill(decoder: Decoder, count: int) -> None:
    """Write random adapters into the slots from 1 on, and give each row the next one."""
    rng = np.random.default_rng(0)
    for item in (item for item in decoder.session.interface.residents if item.slots):
        for slot in range(1, count + 1):
            decoder.session.write(item.input, rng.standard_normal(item.sizes, dtype=np.float32) * 0.01, slot)
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
