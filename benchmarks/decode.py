"""Tokens per second beside transformers."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

from backends.base import CompileOptions
from benchmarks import report
from benchmarks.contenders import Compiled, Contender, Eager, Ours, Rows
from benchmarks.prepare import prepare
from qeff_ir.frontend.weights import memory_weights


@dataclass(frozen=True)
class Race:
    """What is raced: a model shape and a request; lengths in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    batch: int
    context: int
    new_tokens: int
    ctx_len: int
    chunk: int
    threads: int
    rounds: int


@dataclass
class Laps:
    """The figures of one contender, one entry per round.

    Attributes:
        prefill: Seconds to the first token.
        rate: Decoded tokens per second, all rows together.
        tokens: What was generated in the last round, step by step.
    """

    prefill: list[float] = field(default_factory=list[float])
    rate: list[float] = field(default_factory=list[float])
    tokens: list[list[int]] = field(default_factory=list[list[int]])


def main(
    hidden: int = 768,
    layers: int = 12,
    heads: int = 12,
    kv_heads: Annotated[int, typer.Option(help="0: as many as heads")] = 0,
    intermediate: int = 3072,
    vocab: int = 32000,
    batch: int = 1,
    context: Annotated[int, typer.Option(help="tokens of each prompt")] = 100,
    new_tokens: int = 64,
    ctx_len: Annotated[int, typer.Option(help="tokens that a fixed cache has room for")] = 1024,
    chunk: Annotated[int, typer.Option(help="prompt tokens that one of our prefill runs takes")] = 128,
    threads: int = 2,
    rounds: int = 5,
    compiled: Annotated[bool, typer.Option(help="race torch.compile too, which takes a minute")] = True,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the figures here")] = None,
) -> None:
    """Decode with random weights; the defaults are a 125M-parameter Llama (without its embeddings) in float32."""
    race = Race(
        hidden, layers, heads, kv_heads or heads, intermediate, vocab,
        batch, context, new_tokens, ctx_len, chunk, threads, rounds,
    )  # fmt: skip
    torch.set_num_threads(threads)
    model = random_model(race)
    rows = torch.randint(0, vocab, (batch, context), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        contenders, failure = _contenders(race, model, rows, Path(folder), compiled)
        laps = run(contenders, rows, new_tokens, rounds)
    figures = figures_of(laps)
    title = f"decode: batch {batch}, {context} tokens of context, {new_tokens} new, {threads} threads, float32"
    report.table(title, figures, f"torch.compile failed: {failure}" if failure else "")
    report.write_json(json, "decode", asdict(race), figures)
    report.bars(plot, title, figures, "contender", ["tokens/s", "first token ms"])


def run(contenders: list[Contender], rows: Rows, new_tokens: int, rounds: int) -> dict[str, Laps]:
    """Race in rounds, so that whatever else the machine does hits all alike; a first, short round only warms up."""
    laps: dict[str, Laps] = {}
    for index in range(rounds + 1):
        for contender in contenders:
            if index <= 1:
                laps[contender.name] = Laps()
            _lap(contender, rows, new_tokens if index else 4, laps[contender.name])
    return laps


def _lap(contender: Contender, rows: Rows, new_tokens: int, laps: Laps) -> None:
    started = time.perf_counter()
    generated = [contender.prefill(rows)]
    first = time.perf_counter()
    for _ in range(new_tokens):
        generated.append(contender.step(generated[-1]))
    laps.rate.append(len(rows) * new_tokens / (time.perf_counter() - first))
    laps.prefill.append(first - started)
    laps.tokens = generated


def random_model(race: Race) -> Any:
    """A Llama of the race's shape with random weights, float32."""
    config = LlamaConfig(
        vocab_size=race.vocab,
        hidden_size=race.hidden,
        intermediate_size=race.intermediate,
        num_hidden_layers=race.layers,
        num_attention_heads=race.heads,
        num_key_value_heads=race.kv_heads,
        max_position_embeddings=max(2048, race.ctx_len),
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _contenders(race: Race, model: Any, rows: Rows, folder: Path, compiled: bool) -> tuple[list[Contender], str | None]:
    """Who takes part, and why `torch.compile` does not, in one line."""
    options = CompileOptions(prefill_seq_len=race.chunk, ctx_len=race.ctx_len, batch_size=race.batch)
    ours = Ours(prepare(model, memory_weights(model), options, folder, threads=race.threads))
    contenders: list[Contender] = [Eager(model), ours]
    if not compiled:
        return contenders, None
    try:
        contenders.append(Compiled(model, race.ctx_len, rows))
    except Exception as error:  # whatever the compiler or its toolchain raises
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return contenders, f"{type(error).__name__}: {first[:120]}"
    return contenders, None


def figures_of(laps: dict[str, Laps]) -> list[dict[str, Any]]:
    """Medians over the rounds; ratios to the first contender, and how many steps gave its tokens."""
    base = next(iter(laps.values()))
    rate, first = statistics.median(base.rate), statistics.median(base.prefill)
    return [
        {
            "contender": name,
            "tokens/s": statistics.median(lap.rate),
            "x": statistics.median(lap.rate) / rate,
            "first token ms": 1000 * statistics.median(lap.prefill),
            "x faster": first / statistics.median(lap.prefill),
            "equal steps": f"{sum(a == b for a, b in zip(lap.tokens, base.tokens, strict=True))}/{len(base.tokens)}",
        }
        for name, lap in laps.items()
    ]
