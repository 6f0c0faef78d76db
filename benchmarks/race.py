"""Decode and prefill beside peers: the same model, the same prompts, the same threads, in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.bandwidth import bandwidth, step_bytes
from benchmarks.contenders import Start, contenders
from benchmarks.faithful import faithful
from benchmarks.options import Json, Peers, Plot, Quick
from benchmarks.ours import NAME
from benchmarks.peers.contender import WEIGHTS, Contender, Entrant, Rows, RunsAhead
from benchmarks.prepare import lowered
from benchmarks.result import Figure, Result, Row, figure, publish
from benchmarks.shapes import SHAPES, prompts, random_model
from qeff_ir.frontend.checkpoint.weights import memory_weights

Sizes = Annotated[str, typer.Option("--shape", help=f"Model: {', '.join(SHAPES)}.")]
Context = Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)]
Batch = Annotated[int, typer.Option(help="Rows.", min=1)]
NewTokens = Annotated[int, typer.Option(help="Tokens to decode.", min=1)]
Threads = Annotated[int, typer.Option(help="Threads of every contender.", min=1)]
Weights = Annotated[str, typer.Option(help=f"Forms of weights, with commas: {', '.join(WEIGHTS)}.")]
Ours = Annotated[
    list[str], typer.Option("--ours", help="One more float32 row of ours: edits of its pipeline.", metavar="EDITS")
]
Rounds = Annotated[int, typer.Option(help="Measured rounds, after one that warms up.", min=1)]

SHARE = "share of bandwidth %"
"""The figure that tells how close a decode step is to what memory allows."""
GOAL = 90
"""Percent of the bandwidth that we mean to reach."""


@dataclass
class Laps:
    """What one contender did, one entry per measured round.

    Attributes:
        first: Seconds to the first token.
        rate: Decoded tokens per second, all rows together.
        tokens: What was generated in the last round, step by step.
    """

    first: list[float] = field(default_factory=list[float])
    rate: list[float] = field(default_factory=list[float])
    tokens: list[list[int]] = field(default_factory=list[list[int]])


@dataclass(frozen=True)
class Field:
    """Who is asked to take part; see `contenders`."""

    peers: str
    weights: str = "f32"
    ours: Sequence[str] = ()


def decode(
    shape: Sizes = "125M",
    context: Context = 128,
    batch: Batch = 1,
    new_tokens: NewTokens = 64,
    threads: Threads = 2,
    rounds: Rounds = 5,
    weights: Weights = "f32",
    ours: Ours = [],  # noqa: B006  # typer's form of an option that may be given several times
    peers: Peers = "all",
    json: Json = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Tokens per second after a prompt, random weights, greedy."""
    who = Field(peers, weights, ours)
    publish(measure("decode", shape, context, batch, new_tokens, threads, rounds, who, quick), json, plot)


def prefill(
    shape: Sizes = "125M",
    context: Context = 128,
    batch: Batch = 1,
    threads: Threads = 2,
    rounds: Rounds = 5,
    weights: Weights = "f32",
    ours: Ours = [],  # noqa: B006  # typer's form of an option that may be given several times
    peers: Peers = "all",
    json: Json = None,
    plot: Plot = None,
    quick: Quick = False,
) -> None:
    """Time to the first token of a prompt, random weights."""
    who = Field(peers, weights, ours)
    publish(measure("prefill", shape, context, batch, 1, threads, rounds, who, quick), json, plot)


def measure(
    suite: str,
    shape: str,
    context: int,
    batch: int,
    new_tokens: int,
    threads: int,
    rounds: int,
    who: Field,
    quick: bool,
) -> Result:
    """Run a race.

    Raises:
        typer.BadParameter: There is no such shape, peer or form of weights, or nobody can run.
    """
    if quick:
        shape, context, new_tokens, rounds = "tiny", min(context, 16), min(new_tokens, 8), 2
    torch.set_num_threads(threads)
    ctx_len = 2 ** (context + new_tokens).bit_length()
    model = random_model(shape, ctx_len)
    rows = prompts(shape, batch, context)
    module = lowered(model, memory_weights(model))
    # The cache grows while it is read: half of the new tokens are there on average.
    read = step_bytes(module, batch, context + new_tokens // 2)
    with tempfile.TemporaryDirectory() as folder:
        start = Start(model, module, rows, ctx_len, threads, Path(folder))
        entrants = contenders(start, who.peers, who.weights, who.ours)
        racers = [e.contender for e in entrants if e.contender is not None]
        if not racers:
            raise typer.BadParameter("nobody can run: " + "; ".join(f"{e.name}: {e.missing}" for e in entrants))
        laps = run(racers, rows, new_tokens, rounds)
        told = _faithful(entrants, prompts(shape, batch, 12 if quick else 40, seed=2), who)
    settings = {"shape": shape, "context": context, "batch": batch, "threads": threads, "rounds": rounds}
    if who.weights != "f32":
        settings["weights"] = who.weights
    speed = bandwidth(threads) if suite == "decode" else None
    made = rows_of(suite, entrants, laps, rows, None if speed is None else batch * speed / read)
    made = [replace(row, figures={**row.figures, **told.get(row.name, {})}) for row in made]
    forms = dict.fromkeys(entrant.weights for entrant in entrants)
    notes = [standing([row for row, e in zip(made, entrants, strict=True) if e.weights == form]) for form in forms]
    if speed is not None:
        settings["new tokens"] = new_tokens
        notes.append(
            f"a step reads {read / 1e6:,.1f} MB; memory gives {speed / 1e9:.1f} GB/s, caches of the processor more"
        )
        notes += [reached(row) for row in made[:1] if SHARE in row.figures]
    return Result(suite, quick, settings, made, "; ".join(filter(None, notes)))


def _faithful(entrants: Sequence[Entrant], text: Rows, who: Field) -> dict[str, dict[str, Figure]]:
    """See `faithful`; nothing where all compute with the same numbers."""
    return faithful(entrants, text) if who.ours or who.weights != "f32" else {}


def run(racers: Sequence[Contender], rows: Rows, new_tokens: int, rounds: int) -> dict[str, Laps]:
    """Race in rounds, so that whatever else the machine does hits all alike; a first, short round only warms up."""
    laps: dict[str, Laps] = {}
    for index in range(rounds + 1):
        for racer in racers:
            if index <= 1:
                laps[racer.name] = Laps()
            _lap(racer, rows, new_tokens if index else min(4, new_tokens), laps[racer.name])
    return laps


def _lap(racer: Contender, rows: Rows, new_tokens: int, laps: Laps) -> None:
    started = time.perf_counter()
    generated = [racer.prefill(rows)]
    first = time.perf_counter()
    for _ in range(new_tokens):
        generated.append(racer.step(generated[-1]))
    rate = len(rows) * new_tokens / (time.perf_counter() - first)
    if isinstance(racer, RunsAhead):
        racer.finish()
    laps.rate.append(rate)
    laps.first.append(first - started)
    laps.tokens = generated


def rows_of(
    suite: str, entrants: Sequence[Entrant], laps: dict[str, Laps], rows: Rows, ceiling: float | None = None
) -> list[Row]:
    """Figures, and how many steps gave the tokens of the first contender: who computes something else is no peer.

    Args:
        suite: ``decode`` or ``prefill``.
        entrants: Who took part, or would have.
        laps: What they did, by name.
        rows: The prompts.
        ceiling: Tokens per second that the bandwidth of memory allows, where it is known.
    """
    base: Any = next(iter(laps.values()))
    made: list[Row] = []
    for entrant in entrants:
        lap = laps.get(entrant.name)
        if lap is None:
            made.append(Row(entrant.name, missing=entrant.missing))
            continue
        read = len(rows) * len(rows[0])
        figures: dict[str, Figure] = (
            {"tokens/s": figure(lap.rate, "higher")}
            if suite == "decode"
            else {
                "first token ms": figure(1000 * s for s in lap.first),
                "prompt tokens/s": figure((read / s for s in lap.first), "higher"),
            }
        )
        if ceiling is not None and entrant.weights == "f32":  # the rate says which direction is good
            figures[SHARE] = figure((100 * rate / ceiling for rate in lap.rate), "neither")
        equal = sum(a == b for a, b in zip(lap.tokens, base.tokens, strict=True)) / len(base.tokens)
        figures["equal steps %"] = figure([100 * equal], "neither")
        if entrant.memory is not None:
            figures["session MB"] = figure([entrant.memory / 1e6])
            if entrant.needed is not None:
                figures["of weights and caches %"] = figure([100 * entrant.memory / entrant.needed])
        made.append(Row(entrant.name, figures))
    return made


def reached(row: Row) -> str:
    """What share of the memory's bandwidth a contender reaches, against `GOAL`."""
    share = row.figures[SHARE].median
    stands = "at or above" if share >= GOAL else "below"
    return f"{row.name} reaches {share:.1f} % of the memory's bandwidth, {stands} the goal of {GOAL} %"


def standing(rows: Sequence[Row]) -> str:
    """Which others are ahead of our best, and how far, by its first figure; nothing where we do not run."""
    running = [row for row in rows if row.missing is None]
    own = [row for row in running if row.name.startswith(NAME)]
    if not own:
        return ""
    name, first = next(iter(own[0].figures.items()))
    ours = max(own, key=lambda row: row.figures[name].median * (1 if first.better == "higher" else -1))
    peers = [row for row in running if row not in own]
    factors = {peer.name: peer.figures[name].median / ours.figures[name].median for peer in peers}
    ahead = {n: f if first.better == "higher" else 1 / f for n, f in factors.items()}
    told = [f"{n} by {f:.2f} times" for n, f in ahead.items() if f > 1.0]
    if not peers:
        return ""
    return f"ahead of {ours.name}: {', '.join(told)}" if told else f"{ours.name} is ahead of every peer that ran"
