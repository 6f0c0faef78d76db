"""Hypothesis strategies for authors of passes: decoders, near misses, requests, and pipelines that can run.

Everything is small, and shrinks toward the smallest: one layer, one head, the plain spelling, one token. The structure
is drawn first; numbers come from drawn seeds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from backends import backend_names, find_backend
from qeff_ir.errors import PipelineError
from qeff_ir.ir import ports
from qeff_ir.passing.manager import check_order
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.testing.recipe import Layer, Linear, Odd, Recipe

SEEDS = st.integers(0, 2**16)
"""Of weights and tokens."""


@st.composite
def recipes(draw: st.DrawFn, *, most_layers: int = 4, odd: Odd | None = "none") -> Recipe:
    """Decoders of every kind that a `Recipe` can say.

    Args:
        draw: Given by hypothesis.
        most_layers: Largest number of layers.
        odd: A near miss that must be in it, and whatever that needs; `None` draws one.
    """
    if odd is None:
        odd = draw(st.sampled_from(ODD))
    windows = draw(st.lists(st.integers(1, 6), min_size=0, max_size=2, unique=True))
    decomposed = draw(st.sampled_from(["never", "never", "always", "some"]))
    sinks, experts = draw(st.booleans()) and decomposed == "never", draw(st.booleans())
    recurrent = draw(st.sampled_from(["never", "never", "some"]))
    layers: list[Layer] = []
    for index in range(draw(st.integers(1, most_layers))):
        some_experts = draw(st.integers(2, 4)) if experts and draw(st.booleans()) else 0
        if recurrent == "some" and (index or odd == "none") and draw(st.booleans()):
            kind: Linear = draw(st.sampled_from(["decay", "delta"]))
            layers.append(Layer(experts=some_experts, linear=kind, kernel=draw(st.integers(1, 4))))
            continue
        owners = [i for i, layer in enumerate(layers) if layer.shares is None and layer.linear == "none"]
        shares = draw(st.sampled_from(owners)) if owners and draw(st.integers(0, 4)) == 4 else None
        window = draw(st.sampled_from([None, *windows])) if shares is None else None
        written = decomposed == "always" or (decomposed == "some" and draw(st.booleans()))
        layers.append(Layer(window, shares, sinks and draw(st.booleans()), some_experts, written))
    if odd == "strided-mask":
        layers[0] = replace(layers[0], window=None)
    head_dim = draw(st.sampled_from([8, 2, 4, 16]))
    rotary = draw(st.sampled_from(["none", "half", "partial", "interleaved"]))
    if odd in ROTATIONS and rotary not in ("half", "partial"):
        rotary = "half"
    if rotary == "partial" and head_dim == 2:
        head_dim = 4
    activation = draw(st.sampled_from(["swish", "gelu", "gelu-tanh", "relu"]))
    activation = {"gelu-constant": "gelu", "other-gate": "swish"}.get(odd, activation)
    narrow = draw(st.integers(0, 4)) == 4
    return Recipe(
        layers=tuple(layers),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_dim=head_dim,
        value_dim=6 if narrow else head_dim,
        vocab=draw(st.integers(8, 20)),
        rotary=rotary,  # pyright: ignore[reportArgumentType]
        learned_positions=draw(st.booleans()) if rotary == "none" else False,
        alibi=decomposed != "never" and rotary == "none" and draw(st.booleans()),
        norm="rms" if odd == "norm-power" else draw(st.sampled_from(["rms", "layer"])),
        activation=activation,  # pyright: ignore[reportArgumentType]
        gated=draw(st.booleans()),
        bias=odd == "gemm-beta" or draw(st.booleans()),
        gemm=odd == "gemm-beta" or draw(st.booleans()),
        tied=draw(st.booleans()),
        parallel=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.4, 0.7])),  # no 1 / sqrt(head_dim)
        softcap=draw(st.sampled_from([0.0, 2.0])),
        final_softcap=draw(st.sampled_from([0.0, 3.0])),
        odd=odd,
        spelling=draw(st.integers(0, 2**16)),
        seed=draw(SEEDS),
    )


ROTATIONS: tuple[Odd, ...] = (
    "unequal-halves", "other-sign", "same-half", "two-sines", "subtracted", "no-cosine"
)  # fmt: skip
"""Near misses of a rotation."""

ODD: tuple[Odd, ...] = (
    "norm-power",
    "gelu-constant",
    "gemm-beta",
    "strided-mask",
    "other-gate",
    "scaled-keys",
    *ROTATIONS,
)
"""All near misses."""


@dataclass(frozen=True)
class Run:
    """One run of a session.

    Attributes:
        length: Columns: a whole chunk, or one token.
        counts: Real tokens of each row, from the left; the rest is padding.
        restart: Rows that start a new request before the run.
        reset: Whether all states are forgotten before it.
    """

    length: int
    counts: tuple[int, ...]
    restart: tuple[bool, ...]
    reset: bool = False


@dataclass(frozen=True)
class Request:
    """What a session is asked: any cut into chunks, any padding, requests after one another in any row.

    Attributes:
        ctx_len: Positions of the context.
        chunk: Columns of a prefill run.
        runs: The runs.
        vocab: Number of tokens.
        seed: Of the tokens.
    """

    ctx_len: int
    chunk: int
    runs: tuple[Run, ...]
    vocab: int
    seed: int = 0

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.runs[0].counts)

    def feeds(self) -> list[tuple[ports.Run, list[list[int] | None], bool]]:
        """Each run with all tokens of each row so far (`None` where it gets none), and whether to reset before it."""
        random = np.random.default_rng(self.seed)
        rows: list[list[int]] = [[] for _ in range(self.batch)]
        found: list[tuple[ports.Run, list[list[int] | None], bool]] = []
        for run in self.runs:
            ids = random.integers(0, self.vocab, (self.batch, run.length))
            positions = np.full_like(ids, -1)
            for row, count in enumerate(run.counts):
                if run.restart[row] or run.reset:
                    rows[row] = []
                positions[row, :count] = np.arange(count) + len(rows[row])
                rows[row] = [*rows[row], *ids[row, :count].tolist()]
            told = [list(r) if count else None for r, count in zip(rows, run.counts, strict=True)]
            found.append((ports.Run(ids, positions), told, run.reset))
        return found


@st.composite
def requests(draw: st.DrawFn, recipe: Recipe, *, batch: int | None = None, most_runs: int = 7) -> Request:
    """Requests for a decoder that reach past its windows and to the last slot of its context.

    Args:
        draw: Given by hypothesis.
        recipe: The decoder.
        batch: Rows; drawn when not given.
        most_runs: Largest number of runs.
    """
    rows = draw(st.integers(1, 3)) if batch is None else batch
    chunk = draw(st.sampled_from([3, 1, 2, 4, 5]))
    rings = [window + chunk - 1 for i in recipe.owners if (window := recipe.window(i)) is not None]
    edges = [n + more for n in rings for more in (0, 1)]  # a ring as long as the context is none; one slot less is one
    ctx_len = max(chunk, draw(st.sampled_from([12, 7, 9, 16, *edges])))
    lengths = [0] * rows
    runs: list[Run] = []
    for _ in range(draw(st.integers(1, most_runs))):
        reset = bool(runs) and draw(st.integers(0, 9)) == 9
        length = draw(st.sampled_from([chunk, 1]))
        counts, restart = list[int](), list[bool]()
        for row in range(rows):
            anew = reset or (bool(runs) and draw(st.integers(0, 9)) == 9)
            lengths[row] = 0 if anew else lengths[row]
            # Mostly whole chunks, so that the edges of windows and caches are reached.
            wanted = draw(st.sampled_from([length, length, 0, 1, max(length - 1, 0)]))
            counts.append(min(wanted, length, ctx_len - lengths[row]))
            lengths[row] += counts[-1]
            restart.append(anew)
        runs.append(Run(length, tuple(counts), tuple(restart), reset))
    if not any(any(r.counts) for r in runs):
        runs[0] = replace(runs[0], counts=(1,) * rows)
        runs = runs[:1]
    return Request(ctx_len, chunk, tuple(runs), recipe.vocab, draw(SEEDS))


@st.composite
def stock_pipelines(draw: st.DrawFn) -> tuple[str, str]:
    """A backend and its pipeline, with any of its options, and without any of the passes that only make it faster."""
    name = draw(st.sampled_from(backend_names()))
    text = find_backend(name).pipeline
    if draw(st.booleans()):
        text = text.replace("{layout=", "{ring=off layout=")
    if "impl=standard" in text and draw(st.integers(0, 3)) == 3:
        text = text.replace("impl=standard", "impl=grouped")
    optional = [
        "unflatten",
        "fuse-norms",
        "fuse-rotary",
        "fuse-activations",
        "fuse-products",
        "ort-attention",
        "ort-rotary",
        "ort-packed-attention",
        "ort-kernels",
        "fp16-clip",
    ]
    dropped = draw(st.lists(st.sampled_from(optional), max_size=2, unique=True))
    kept = [item for item in text.split(",") if item not in dropped]
    return name, ",".join(kept)


@st.composite
def orders(draw: st.DrawFn, text: str) -> str:
    """Another order of a pipeline's passes that their properties allow."""
    items, rest = list[str](), text.split(",")
    held: set[str] = set()
    while rest:
        able = [i for i in rest if _allowed(i, held)]
        item = draw(st.sampled_from(able))
        rest.remove(item)
        items.append(item)
        held |= Pipeline.parse(item).passes[0].established()
    return ",".join(items)


def _allowed(item: str, held: set[str]) -> bool:
    try:
        check_order(Pipeline.parse(item), set(held))
    except PipelineError:
        return False
    return True


CONFIGS: dict[str, Any] = {
    "vocab_size": 31,
    "num_hidden_layers": 2,
    "hidden_size": 24,  # a multiple of every number of heads that is drawn: transformers refuses others
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What every drawn configuration starts from."""


@st.composite
def configs(draw: st.DrawFn, model_type: str, *, windowed: bool) -> dict[str, Any]:
    """Small configurations of a transformers architecture that has the usual names for its sizes.

    Args:
        draw: Given by hypothesis.
        model_type: transformers' name.
        windowed: Whether the architecture has layers with a window.
    """
    kv_heads = draw(st.sampled_from([1, 2]))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 100.0]))}
    return CONFIGS | {
        "model_type": model_type,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([8, 4])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rope,
        **({"sliding_window": draw(st.integers(2, 6))} if windowed else {}),
    }


def pairs(items: list[str]) -> list[tuple[str, str]]:
    """All pairs of different entries."""
    return list(itertools.permutations(items, 2))
