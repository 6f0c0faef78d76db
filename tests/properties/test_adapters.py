"""Adapters in slots: every row answers as a decoder with its adapter in the weights, slot 0 as one without (P12)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from backends import backend_names, find_backend
from qeff_ir import numerics
from qeff_ir.arrays import Array
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.session import Session
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import explained, options, prepare, session_answers
from qeff_ir.testing.recipe import Layer, Recipe, answer
from qeff_ir.testing.strategies import SEEDS, Request, Run, recipes, requests
from tests.properties import LONG, RICH, scaled

SLOTS = 2
PREFIX = "model."
BIASED = Recipe(
    (Layer(),), kv_heads=1, group=1, head_dim=8, value_dim=8, vocab=8, rotary="none", activation="swish", gated=False,
    norm="layer", bias=True, gemm=False, qk_norm=True, spelling=221,
)  # fmt: skip
"""A bias, a residual and a layer norm in a row, which a runtime may fuse, and then adds the bias in another order."""
WIDE = replace(BIASED, group=40)
"""Products over more numbers than a runtime's kernel sums in one go: a bias fused into one comes in between."""
FULL = Request(12, 3, (Run(3, (3, 3, 3), (False,) * 3),), 8, seed=0)


@dataclass(frozen=True)
class Adapters:
    """What is loaded, and which row has which.

    Attributes:
        targets: Layers that get a branch.
        ranks: Of each slot's adapter.
        rows: Slot of each row; 0 is the base model.
        seed: Of the factors.
    """

    targets: str
    ranks: tuple[int, ...]
    rows: tuple[int, ...]
    seed: int

    def factors(self, module: Module, slot: int) -> dict[str, tuple[Array, Array]]:
        """``[in, rank]`` and ``[rank, out]`` by layer: they change every logit, and by not too much."""
        shapes = {(str(item.path), item.part): item.sizes for item in module.adapters}
        found: dict[str, tuple[Array, Array]] = {}
        for index, layer in enumerate(sorted({layer for layer, _ in shapes})):
            random, rank = np.random.default_rng([self.seed, slot, index]), self.ranks[slot - 1]
            a = random.standard_normal((shapes[layer, "a"][0], rank)) / np.sqrt(shapes[layer, "a"][0])
            b = random.standard_normal((rank, shapes[layer, "b"][1])) * 0.15
            found[layer] = a.astype(np.float32), b.astype(np.float32)
        return found


def adapted(recipe: Recipe, targets: str) -> set[str]:
    """Layers that must get a branch."""
    found: set[str] = set()
    for index, layer in enumerate(recipe.layers):
        parts = ["q", "o", *(["k", "v"] if layer.shares is None else [])]
        parts += {"none": [], "decay": ["g"], "delta": ["g", "b"]}[layer.linear]
        parts += [] if layer.experts else ["up", "down", *(["gate"] if recipe.gated else [])]
        found |= {f"{PREFIX}layers.{index}.{part}" for part in parts}
    return {n for n in found if targets == "all-linear" or n.rpartition(".")[2] in targets.split(",")}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, Request, Adapters]:
    recipe = draw(recipes(most_layers=2))
    request = draw(requests(recipe, batch=3, most_runs=4))
    dense = any(not layer.experts for layer in recipe.layers)
    choices: list[str] = ["all-linear", "q,o", *(["down", "v,up"] if dense else [])]
    targets = draw(st.sampled_from(choices))
    ranks = draw(st.tuples(*[st.integers(1, 3)] * SLOTS))
    return recipe, request, Adapters(targets, ranks, tuple(draw(st.permutations(range(SLOTS + 1)))), draw(SEEDS))


def opened(module: Module, request: Request, target: str, folder: Path, adapters: Adapters | None) -> Session:
    """A session on the package of a module, with its adapters loaded where there are any."""
    backend = find_backend(target)
    pipeline = Pipeline.parse(backend.pipeline)
    if adapters is not None:
        retained = "true" if target == "ai100" else "false"
        step = f'lora{{n={SLOTS} rank=3 targets="{adapters.targets}" retained={retained}}}'
        pipeline = pipeline.insert_after("last-logits", step)
    run_pipeline(module, pipeline)
    backend.check(module, options(request))
    backend.emit(module, folder, options(request))
    session = backend.open(folder, threads=1)
    for slot in range(1, SLOTS + 1) if adapters is not None else ():
        assert adapters is not None
        for layer, parts in adapters.factors(module, slot).items():
            for part, numbers in zip(("a", "b"), parts, strict=True):
                (item,) = [i for i in module.adapters if (i.path, i.part) == (layer, part)]
                padded = np.zeros(item.sizes, np.float32)
                padded[: numbers.shape[0], : numbers.shape[1]] = numbers
                session.write(item.input, padded, slot)
    return session


def added(module: Module, adapters: Adapters, slot: int) -> Mapping[str, Array]:
    """What a slot adds to the weights, in double precision, by the recipe's names."""
    factors = adapters.factors(module, slot) if slot else {}
    return {n.removeprefix(PREFIX): a.astype(np.float64) @ b.astype(np.float64) for n, (a, b) in factors.items()}


@scaled(0.5)
@given(cases(), st.sampled_from(backend_names()))
@example((RICH[0], LONG, Adapters("all-linear", (3, 1), (1, 0, 2), 1)), "ai100")
@example((RICH[0], LONG, Adapters("all-linear", (2, 3), (2, 2, 1), 2)), "onnxruntime")
@example((RICH[2], LONG, Adapters("v,up", (1, 2), (1, 2, 0), 3)), "onnxruntime")
@example((BIASED, FULL, Adapters("all-linear", (1, 1), (0, 1, 2), 0)), "onnxruntime")
@example((WIDE, FULL, Adapters("all-linear", (1, 1), (0, 1, 2), 0)), "ai100")
def test_p12_rows_answer_with_their_own_adapter(case: tuple[Recipe, Request, Adapters], target: str) -> None:
    recipe, request, adapters = case
    base = prepare(build(recipe).module, request)
    module, limit = base.clone(), numerics.bound(numerics.depth(base))
    with (
        explained("P12 adapters", base, pipeline=str(adapters), recipe=recipe, request=request),
        tempfile.TemporaryDirectory() as folder,
    ):
        session = opened(module, request, target, Path(folder) / "adapters", adapters)
        assert {item.path for item in module.adapters} == adapted(recipe, adapters.targets)
        weights = [added(module, adapters, slot) for slot in range(SLOTS + 1)]
        exact = [
            answer(recipe, tokens, weights[adapters.rows[row]])[-1]
            for _, rows, _ in request.feeds()
            for row, tokens in enumerate(rows)
            if tokens is not None
        ]
        found = session_answers(session, request, adapters=np.array(adapters.rows))
        error = numerics.error_over_rms(found, np.stack(exact))
        assert error <= limit, f"the error is {error:.2e} of {limit:.2e} allowed"
        none = session_answers(session, request, adapters=np.zeros(request.batch, np.int64))
        alone = session_answers(opened(base, request, target, Path(folder) / "base", None), request)
        np.testing.assert_array_equal(none, alone)


def test_the_adapters_of_the_property_change_the_answers() -> None:
    """Its kill test: were the factors too small to see, or the same in both slots, any wiring would do."""
    adapters = Adapters("all-linear", (1, 3), (0, 1, 2), 1)
    module = prepare(build(RICH[0]).module, LONG)
    run_pipeline(module, Pipeline.parse(f"canonicalize,unflatten,lora{{n={SLOTS} rank=3}}"))
    tokens = [1, 2, 3, 4]
    one, two, base = (answer(RICH[0], tokens, added(module, adapters, slot)) for slot in (1, 2, 0))
    limit = 1000 * numerics.bound(numerics.depth(module))
    for values, other in ((one, base), (two, base), (one, two)):
        assert numerics.error_over_rms(values, other) > limit
    assert len(added(module, adapters, 1)) == len({item.path for item in module.adapters}) >= 7 * len(RICH[0].layers)
