"""Many requests at once: tokens per second and time to the first token, what a prefix saves, what scheduling costs."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.batching import Batcher, OurEngine, Reply, TransformersBatching
from benchmarks.options import Json, Peers, Plot, Quick
from benchmarks.peers.contender import Rows
from benchmarks.prepare import lowered
from benchmarks.race import Context, NewTokens, Rounds, Sizes, Threads
from benchmarks.result import Figure, Result, Row, figure, publish
from benchmarks.shapes import SHAPES, random_model
from qeff_ir.frontend.checkpoint.weights import memory_weights

PEERS = ("transformers",)
"""The peers, by the names that `--peers` takes."""
_CHUNK = 128
"""Prompt tokens of a run of ours, at most; a quarter of the context at most: prefixes are used in whole chunks."""
_LENGTHS = (1.0, 0.25, 0.5)
"""Lengths of prompts, in turn, as shares of the context."""


@dataclass
class Laps:
    """What one contender did with so many requests at once, one entry per measured round."""

    rate: list[float] = field(default_factory=list[float])
    first: list[float] = field(default_factory=list[float])
    scheduling: list[float] = field(default_factory=list[float])
    replies: list[Reply] = field(default_factory=list[Reply])


def main(
    shape: Sizes = "125M",
    context: Context = 128,
    new_tokens: NewTokens = 32,
    at_once: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "1,2,4,8,16,32",
    threads: Threads = 2,
    rounds: Rounds = 3,
    peers: Peers = "all",
    json: Json = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Answer 1 to 32 requests at once, of mixed lengths, then one whose prefix was there before."""
    if quick:
        shape, context, new_tokens, rounds, at_once = "tiny", 32, 8, 1, "1,4"
    torch.set_num_threads(threads)
    counts = [int(count) for count in at_once.split(",")]
    wanted = PEERS if peers == "all" else () if peers == "none" else tuple(peers.split(","))
    if unknown := [peer for peer in wanted if peer not in PEERS]:
        raise typer.BadParameter(f"there is no peer '{unknown[0]}': it is one of {', '.join(PEERS)}")
    ctx_len = 2 ** (context + new_tokens).bit_length()
    model = random_model(shape, ctx_len)
    with tempfile.TemporaryDirectory() as folder:
        module = lowered(model, memory_weights(model))
        ours = OurEngine(
            module, max(counts), min(_CHUNK, max(1, context // 4)), ctx_len, threads, Path(folder) / "package"
        )
        batchers: list[Batcher] = [ours]
        if "transformers" in wanted:
            batchers.append(TransformersBatching(model, max(counts), ctx_len))
        rows = [row for count in counts for row in measure(batchers, count, shape, context, new_tokens, rounds)]
        rows.append(prefix(ours, shape, context, rounds))
        ours.engine.close()
    settings = {"shape": shape, "context": context, "new tokens": new_tokens, "threads": threads, "rounds": rounds}
    publish(Result("serve", quick, settings, rows, _note(rows, ours.name, counts)), json, plot)


def measure(
    batchers: Sequence[Batcher], count: int, shape: str, context: int, new_tokens: int, rounds: int
) -> list[Row]:
    """A row for each contender, which take turns; a first round only warms up."""
    laps = {batcher.name: Laps() for batcher in batchers}
    for number in range(rounds + 1):
        prompts = _prompts(shape, count, context, seed=1000 * count + number)
        for batcher in batchers:
            before = batcher.stats() if isinstance(batcher, OurEngine) else None
            replies = batcher.answer(prompts, new_tokens if number else min(2, new_tokens))
            if not number:
                continue
            lap = laps[batcher.name]
            lap.replies = replies
            lap.rate.append(sum(len(r.tokens) for r in replies) / max(r.times[-1] for r in replies))
            lap.first.append(statistics.median(r.times[0] for r in replies))
            if before is not None and isinstance(batcher, OurEngine):
                after = batcher.stats()
                busy, over = after.busy - before.busy, after.overhead - before.overhead
                lap.scheduling.append(100 * over / (busy + over))
    base = next(iter(laps.values())).replies
    return [_row(f"{name}, {count} at once", lap, base) for name, lap in laps.items()]


def _row(name: str, lap: Laps, base: Sequence[Reply]) -> Row:
    pairs = [(a, b) for x, y in zip(lap.replies, base, strict=True) for a, b in zip(x.tokens, y.tokens, strict=True)]
    figures: dict[str, Figure] = {
        "tokens/s": figure(lap.rate, "higher"),
        "first token ms": figure(1000 * s for s in lap.first),
        "equal tokens %": figure([100 * sum(a == b for a, b in pairs) / len(pairs)], "neither"),
    }
    if lap.scheduling:
        figures["between runs %"] = figure(lap.scheduling)
    return Row(name, figures)


def prefix(ours: OurEngine, shape: str, context: int, rounds: int) -> Row:
    """What a prompt costs that begins as the one before it: all but the last eighth is there already."""
    saved: list[float] = []
    times: list[float] = []
    alone: list[float] = []
    for number in range(rounds):
        first, second = _prompts(shape, 2, context, seed=77 + number, lengths=(1.0,))
        kept = context - max(1, context // 8)
        ours.answer([first], 1)
        before = ours.stats().reused
        replies = ours.answer([first[:kept] + second[kept:]], 1)
        saved.append(100 * (ours.stats().reused - before) / kept)
        times.append(replies[0].times[0])
        alone.append(ours.answer([second], 1)[0].times[0])
    figures = {"prefill saved %": figure(saved, "higher"), "first token ms": figure(1000 * s for s in times)}
    figures["of a whole prefill %"] = figure(100 * a / b for a, b in zip(times, alone, strict=True))
    return Row(f"{ours.name}, prefix", figures)


def _prompts(shape: str, count: int, context: int, seed: int, lengths: Sequence[float] = _LENGTHS) -> Rows:
    """Random tokens of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [max(1, int(context * lengths[number % len(lengths)])) for number in range(count)]
    return [torch.randint(0, SHAPES[shape]["vocab"], (size,), generator=generator).tolist() for size in sizes]


def _note(rows: Sequence[Row], name: str, counts: Sequence[int]) -> str:
    """How many times our own single stream the most requests at once give."""
    rates = {row.name: row.figures["tokens/s"].median for row in rows if "tokens/s" in row.figures}
    one = rates.get(f"{name}, 1 at once")
    if one is None:
        return ""
    factors = [f"{count} at once {rates[f'{name}, {count} at once'] / one:.2f}" for count in counts if count != 1]
    return f"times our own single stream: {', '.join(factors)}"
