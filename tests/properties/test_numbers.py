"""The numbers: every pass keeps its promise, every package answers as its recipe does (P10-P12, P14, P15)."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends import backend_names, find_backend
from backends.ai100 import contract
from qeff_ir import numerics
from qeff_ir.errors import QeffError
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import to_text
from qeff_ir.passing.base import registered_passes
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.properties import FAST
from qeff_ir.runtime.session import Session
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import expected, explained, module_answers, options, prepare, session_answers
from qeff_ir.testing.recipe import Layer, Recipe
from qeff_ir.testing.strategies import Request, orders, recipes, requests, stock_pipelines
from tests.properties import FULL, LONG, RICH, rich, scaled

TWO_READERS = Recipe((Layer(), Layer(shares=0, decomposed=True)), spelling=3)
"""Attention that chooses by its mask and attention that adds it read one cache."""
STRIDED = Recipe(head_dim=8, value_dim=8, odd="strided-mask")
"""All that a kernel for causal attention could want, but for keys that are skipped."""


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, Request]:
    recipe = draw(recipes(odd=None) if draw(st.integers(0, 2)) == 2 else recipes())
    return recipe, draw(requests(recipe))


def hold(values: np.ndarray, exact: np.ndarray, module: Module) -> None:
    """Within the bound of the module before any pass."""
    error, limit = numerics.error_over_rms(values, exact), numerics.bound(numerics.depth(module))
    assert error <= limit, f"the error is {error:.2e} of {limit:.2e} allowed"


@scaled(0.5)
@rich()
@example((STRIDED, LONG), ("onnxruntime", find_backend("onnxruntime").pipeline))
@given(cases(), stock_pipelines())
def test_p10_every_pass_keeps_its_numeric_promise(case: tuple[Recipe, Request], stock: tuple[str, str]) -> None:
    recipe, request = case
    module = prepare(build(recipe).module, request)
    depth, exact = numerics.depth(module), expected(recipe, request)
    with explained("P10 passes", module, pipeline=stock[1], recipe=recipe, request=request):
        before = module_answers(module, request)
        hold(before, exact, module)
        for item in Pipeline.parse(stock[1]).passes:
            (run,) = run_pipeline(module, Pipeline((item,))).runs
            if not run.modified:
                continue
            after = module_answers(module, request)
            problem = item.numeric.problem(numerics.Observed(before, after, exact, depth))
            assert problem is None, f"{item.name}: {problem}"
            before = after


def opened(module: Module, request: Request, stock: tuple[str, str], folder: Path) -> Session:
    """A session on the package that a backend makes of a module."""
    name, text = stock
    backend = find_backend(name)
    run_pipeline(module, Pipeline.parse(text))
    backend.check(module, options(request))
    backend.emit(module, folder, options(request))
    return backend.open(folder, threads=1)


@scaled(0.8)
@rich()
@example((RICH[2], FULL), ("onnxruntime", find_backend("onnxruntime").pipeline))
@example((TWO_READERS, LONG), ("ai100", find_backend("ai100").pipeline))
@given(cases(), stock_pipelines())
def test_p11_packages_answer_as_the_recipe_however_the_request_is_cut(
    case: tuple[Recipe, Request], stock: tuple[str, str]
) -> None:
    recipe, request = case
    module = prepare(build(recipe).module, request)
    start, exact = module.clone(), expected(recipe, request)
    with (
        explained("P11 packages", module, pipeline=stock[1], recipe=recipe, request=request),
        tempfile.TemporaryDirectory() as folder,
    ):
        session = opened(module, request, stock, Path(folder))
        first = session_answers(session, request)
        hold(first, exact, start)
        np.testing.assert_array_equal(session_answers(session, request), first)  # nothing is left after a reset


@scaled(0.3)
@rich()
@given(cases(), stock_pipelines())
def test_p12_rows_do_not_know_of_each_other(case: tuple[Recipe, Request], stock: tuple[str, str]) -> None:
    """Whoever shares the batch: a row that is alone with idle rows answers the same."""
    recipe, request = case
    module = prepare(build(recipe).module, request)
    with (
        explained("P12 rows", module, pipeline=stock[1], recipe=recipe, request=request),
        tempfile.TemporaryDirectory() as folder,
    ):
        session = opened(module, request, stock, Path(folder))
        together = session_answers(session, request)
        owners = [row for run in request.runs for row, count in enumerate(run.counts) if count]
        for row in set(owners):
            session.reset()
            alone = []
            for run, told, reset in request.feeds():
                if reset:
                    session.reset()
                positions = np.full_like(run.positions, -1)
                positions[row] = run.positions[row]
                logits = session.run({"input_ids": run.tokens, "position_ids": positions})["logits"]
                if told[row] is not None:
                    alone.append(logits[row, 0])
            mine = together[[i for i, owner in enumerate(owners) if owner == row]]
            hold(np.stack(alone), mine, module)


@scaled(0.4)
@given(cases(), st.sampled_from(backend_names()).flatmap(lambda name: orders(find_backend(name).pipeline)))
@example((RICH[0], LONG), "canonicalize,last-logits,kv-retention{layout=scatter},attention,legalize,fuse-norms")
def test_p13_legal_orders_answer_alike(case: tuple[Recipe, Request], text: str) -> None:
    """Any order that the declared properties allow is refused in a sentence, or right."""
    recipe, request = case
    check_any(prepare(build(recipe).module, request), text, recipe, request)


@st.composite
def sequences(draw: st.DrawFn) -> str:
    """Any passes after the first, some more than once, that keep the numbers of the logits.

    Those of `dtype` are held by `test_dtypes`, and those of fast passes by `test_lowbit`; an embedder has no logits.
    """
    layout = draw(st.sampled_from(["{layout=scatter}", "{layout=tensor-scatter}"]))
    others = {"dtype", "embedding-output", "sampling"}
    names = [name for name, cls in registered_passes().items() if name not in others and FAST not in cls.establishes]
    items = draw(st.lists(st.sampled_from(names), max_size=5))
    return ",".join(["canonicalize", *(i + (layout if i == "kv-retention" else "") for i in items)])


@scaled(0.5)
@given(cases(), sequences())
@example((RICH[1], LONG), "canonicalize,last-logits,last-logits")
@example((RICH[0], LONG), "canonicalize,kv-retention{layout=scatter},kv-retention{layout=tensor-scatter},unflatten")
@example((RICH[2], FULL), "canonicalize,kv-retention{layout=tensor-scatter},kv-retention{layout=tensor-scatter}")
@example((RICH[0], LONG), "canonicalize,token-embedding")
@example((RICH[1], LONG), "canonicalize,last-logits,token-embedding,unflatten")
def test_p14_any_sequence_of_passes_is_refused_or_right(case: tuple[Recipe, Request], text: str) -> None:
    recipe, request = case
    check_any(prepare(build(recipe).module, request), text, recipe, request)


def check_any(module: Module, text: str, recipe: Recipe, request: Request) -> None:
    start, exact = module.clone(), expected(recipe, request)
    with explained("P14 sequences", module, pipeline=text, recipe=recipe, request=request):
        for item in Pipeline.parse(text).passes:
            before = to_text(module)
            try:
                run_pipeline(module, Pipeline((item,)))
            except QeffError:
                assert to_text(module) == before
                continue
        hold(module_answers(module, request, start), exact, start)


@scaled(0.4)
@rich(stock=False)
@given(cases())
def test_p15_both_targets_have_one_interface(case: tuple[Recipe, Request]) -> None:
    recipe, request = case
    faces = []
    for name in backend_names():
        module = prepare(build(recipe).module, request)
        text = find_backend(name).pipeline
        with (
            explained("P15 targets", module, pipeline=text, recipe=recipe, request=request),
            tempfile.TemporaryDirectory() as folder,
        ):
            opened(module, request, (name, text), Path(folder))
            if name == "ai100":
                assert list(contract.violations(Path(folder))) == []
            sizes = {(s.symbols["batch_size"], s.symbols["ctx_len"]) for s in module.specializations}
            assert sizes == {(request.batch, request.ctx_len)}
            assert max(s.symbols["seq_len"] for s in module.specializations) == request.chunk
            faces.append(
                (
                    [(v.name, v.dtype) for v in (*module.graph.inputs, *module.graph.outputs)],
                    [dataclasses.replace(s, shape=s.shape[:2] + s.shape[3:]) for s in module.states],
                    [(s.name, s.symbols["seq_len"], s.symbols["ctx_len"]) for s in module.specializations],
                )
            )
    assert len(faces) > 1 and all(face == faces[0] for face in faces)


def test_the_comparison_refuses_nothing_to_compare() -> None:
    """The kill test of `hold`: empty, constant and not-a-number references are refused, a wrong value is told."""
    module = build(Recipe()).module
    for nothing in (np.zeros((0, 3)), np.zeros((2, 3)), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match="nothing can be learnt"):
            hold(nothing, nothing, module)
    right = np.random.default_rng(0).standard_normal((2, 3))
    hold(right, right, module)
    with pytest.raises(AssertionError, match="allowed"):
        hold(right * 1.0001, right, module)
