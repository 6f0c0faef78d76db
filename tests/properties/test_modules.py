"""What holds of every pass on every drawn decoder, told without running it (P1, P2, P4-P9)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, note
from hypothesis import strategies as st

from backends import find_backend
from qeff_ir.errors import PassError, VerificationError
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import fingerprint, structure, to_text
from qeff_ir.ir.residents import Resident
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.ir.verifier import verify
from qeff_ir.passing.base import Rewriter
from qeff_ir.passing.manager import PassRun, run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.testing.build import Built, build
from qeff_ir.testing.judge import explained, prepare
from qeff_ir.testing.recipe import Layer, Recipe
from qeff_ir.testing.strategies import ODD, Request, recipes, requests, stock_pipelines
from tests.properties import EDGE, RICH, rich, scaled


@st.composite
def cases(draw: st.DrawFn, odd: bool = True) -> tuple[Recipe, Request]:
    recipe = draw(recipes(odd=None) if odd and draw(st.booleans()) else recipes())
    return recipe, draw(requests(recipe, most_runs=1))


def passes_of(text: str) -> Iterator[Pipeline]:
    for item in Pipeline.parse(text).passes:
        yield Pipeline((item,))


def interface(module: Module) -> list[tuple[str | None, object, str]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*module.graph.inputs, *module.graph.outputs)]


def weights(module: Module) -> dict[str, Any]:
    """The tensor objects themselves, by the name of the parameter."""
    return {
        v.metadata_props[WEIGHT_KEY]: v.const_value
        for v in module.graph.initializers.values()
        if WEIGHT_KEY in v.metadata_props
    }


@scaled(1.0)
@given(cases())
def test_p1_p2_saving_and_loading_is_the_identity(case: tuple[Recipe, Request]) -> None:
    recipe, request = case
    module = prepare(build(recipe).module, request)
    with explained("P2 saving and loading", module, recipe=recipe), tempfile.TemporaryDirectory() as folder:
        back = load_module(save_module(module, Path(folder)))
        assert to_text(back) == to_text(module)
        assert back.facts() == module.facts()
        for name, tensor in weights(module).items():
            found = weights(back)[name]
            assert found.tobytes() == tensor.tobytes(), name
        again = module.clone()
        assert to_text(again) == to_text(module)
        again.graph.outputs.pop()
        assert len(module.graph.outputs) == len(again.graph.outputs) + 1


def _other_number(module: Module) -> None:
    node = next(n for n in module.graph if n.op_type == "Constant" or n.attributes)
    name, attribute = next(iter(node.attributes.items()))
    if isinstance(attribute.value, ir.Tensor):
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy() + 1))
    else:
        node.attributes[name] = ir.AttrInt64(name, 17)


def _other_operand(module: Module) -> None:
    node = next(n for n in reversed(list(module.graph)) if n.op_type == "MatMul")
    node.replace_input_with(0, node.inputs[1])


def _other_window(module: Module) -> None:
    module.residents[0] = dataclasses.replace(module.residents[0], window=(module.residents[0].window or 0) + 1)


def _ring(module: Module) -> None:
    module.residents[-1] = dataclasses.replace(module.residents[-1], ring=True)


def _other_size(module: Module) -> None:
    module.specializations[0].symbols["ctx_len"] += 1  # pyright: ignore[reportIndexIssue]


def _other_type(module: Module) -> None:
    module.graph.inputs[-1].dtype = ir.DataType.FLOAT16


def _one_output_less(module: Module) -> None:
    module.graph.outputs.pop()


def _another_property(module: Module) -> None:
    module.properties.add("odd")


CHANGES = [
    _other_number, _other_operand, _other_window, _ring, _other_size, _other_type, _one_output_less, _another_property
]  # fmt: skip


@scaled(1.0)
@given(cases(), st.sampled_from(CHANGES))
def test_p1_every_change_shows_in_the_text(case: tuple[Recipe, Request], change: Callable[[Module], None]) -> None:
    """Packages are found again by the fingerprint: what does not show in the text would be served from another one."""
    recipe, request = case
    module = prepare(build(recipe).module, request)
    before = fingerprint(module)
    assert fingerprint(module.clone()) == before
    change(module)
    assert fingerprint(module) != before, change.__name__


# P4: the verifier takes every drawn module, and each kind of damage is told with its code.


def _reads_early(module: Module) -> None:
    nodes = list(module.graph)
    reader = next(n for n in nodes[3:] if any(v is not None and v.producer() is not None for v in n.inputs))
    module.graph.remove(reader)
    module.graph.insert_before(nodes[0], reader)


def _name_twice(module: Module) -> None:
    one, other = [n.outputs[0] for n in module.graph][-3:-1]
    other.name = one.name


def _no_such_operator(module: Module) -> None:
    next(n for n in module.graph if n.op_type == "MatMul").op_type = "MatMull"


def _body_gone(module: Module) -> None:
    module.model.functions.clear()


def _state_of_other_shape(module: Module) -> None:
    module.residents[0] = dataclasses.replace(module.residents[0], shape=(*module.residents[0].shape[:3], 99))


def _state_without_output(module: Module) -> None:
    module.graph.outputs.pop()


def _states_out_of_order(module: Module) -> None:
    module.residents[:2] = reversed(module.residents[:2])


def _undeclared_dim(module: Module) -> None:
    del module.dims["ctx_len"]


def _specialization_without_size(module: Module) -> None:
    del module.specializations[0].symbols["ctx_len"]  # pyright: ignore[reportIndexIssue]


def _untyped_input(module: Module) -> None:
    module.graph.inputs[0].shape = None


def _stray_state(module: Module) -> None:
    logits = module.output("logits")
    logits.name = f"past_key.9{Resident.SUFFIX}"


DAMAGE: dict[Callable[[Module], None], str] = {
    _reads_early: "order", _name_twice: "names", _no_such_operator: "operator", _body_gone: "operator",
    _state_of_other_shape: "state-pair", _state_without_output: "state-pair", _states_out_of_order: "state-kinds",
    _undeclared_dim: "interface", _specialization_without_size: "dims", _untyped_input: "interface",
    _stray_state: "state-pair",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@scaled(0.1)
@given(cases())
def test_p4_damage_is_told_with_its_code(damage: Callable[[Module], None], case: tuple[Recipe, Request]) -> None:
    recipe, request = case
    module = prepare(build(recipe).module, request)
    verify(module)
    damage(module)
    with pytest.raises(VerificationError) as error:
        verify(module)
    assert error.value.code == DAMAGE[damage], damage.__name__


# P5, P6, P8, P9: what the manager promises, observed from outside it.


@scaled(0.6)
@rich()
@given(cases(), stock_pipelines())
def test_p5_p8_p9_every_pass_keeps_its_word(case: tuple[Recipe, Request], stock: tuple[str, str]) -> None:
    recipe, request = case
    module, text = prepare(build(recipe).module, request), stock[1]
    with explained("P5 passes keep their word", module, pipeline=text, recipe=recipe, request=request):
        first, tied = weights(module), len(weights(module))
        for step in passes_of(text):
            (item,) = step.passes
            before, was, facts = to_text(module), interface(module), [str(s) for s in module.states]
            (run,) = run_pipeline(module, step, check=2).runs
            verify(module)
            assert run.modified == (to_text(module) != before), item.name
            if not item.changes_interface:
                assert interface(module) == was and [str(s) for s in module.states] == facts, item.name
            assert [v.name for v in module.graph.inputs] == [n for n, _, _ in was[: len(module.graph.inputs)]]
            now = weights(module)
            if item.changes_weights:
                first = now
            assert now.keys() == first.keys() and all(now[n] is first[n] for n in now), item.name
            assert item.establishes <= item.established() <= module.properties
            if item.idempotent:
                again, form = module.clone(), structure(module)
                run_pipeline(again, step, check=0)
                assert structure(again) == form, f"{item.name} changes its own result"
        assert len(weights(module)) == tied


@scaled(0.6)
@given(cases(), stock_pipelines(), st.integers(1, 40))
def test_p6_a_pass_that_fails_leaves_the_module_alone(
    case: tuple[Recipe, Request], stock: tuple[str, str], when: int
) -> None:
    recipe, request = case
    module = prepare(build(recipe).module, request)
    left, admitted = when, Rewriter.rewrite

    def failing(self: Rewriter, rule: str) -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            raise PassError("planted")
        return admitted(self, rule)

    with explained("P6 transactions", module, pipeline=stock[1], recipe=recipe), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewriter, "rewrite", failing)
        for step in passes_of(stock[1]):
            before, tensors, facts = to_text(module), weights(module), module.facts()
            failure = None
            try:
                run_pipeline(module, step)
            except PassError as error:
                failure = error
            if failure is not None:
                assert "planted" in str(failure)
                assert to_text(module) == before and module.facts() == facts
                after = weights(module)
                assert after.keys() == tensors.keys() and all(after[n] is tensors[n] for n in after)
                verify(module)
                return


# P7: a pass fires at just the sites that the generator planted, and reports just the near misses.


def planted(built: Built, request: Request, text: str) -> dict[str, Counter[str]]:
    """How often each rule of a stock pipeline must fire on a module."""
    p, module, names = built.planted, built.module, [i.partition("{")[0] for i in text.split(",")]
    windows = {s.window for s in module.states if s.window is not None}
    decomposed = {i for i, layer in enumerate(built.recipe.layers) if layer.decomposed}
    decomposed |= {0} if built.recipe.odd == "scaled-keys" else set()  # whoever reads the cache is no attention either
    rings = 0
    if "ring=off" not in text:
        for window in windows:
            users = [i for i in range(len(built.recipe.layers)) if built.recipe.window(i) == window]
            fits = window + request.chunk - 1 < request.ctx_len and not decomposed & set(users)
            rings += fits * sum(s.window == window for s in module.states)
    scatter = "CtxScatter" if "layout=scatter" in text else "TensorScatter"
    swish, gelu = p["Swish"], p["Gelu"] + p["Gelu tanh"]
    found = {
        "fuse-norms": Counter({"RMSNormalization": p["RMSNormalization"]}),
        "fuse-rotary": Counter({"RotaryEmbedding": p["RotaryEmbedding"]}),
        "fuse-activations": Counter({n: p[n] for n in ("Swish", "Gelu", "Gelu tanh")}),
        "unflatten": Counter({"Gemm": p["Gemm"]}),
        "last-logits": Counter({"selection": 1}),
        "kv-retention": Counter(
            {"CachePositions": p["CachePositions"], f"{scatter} ring": rings, scatter: p["write"] - rings}
        ),
        "attention": Counter({"sinks": p["sinks"], "grouped": p["Attention"] * ("impl=standard" not in text)}),
        "ort-attention": Counter({"GroupQueryAttention": p["GroupQueryAttention"] * ("impl=standard" in text)}),
        "ort-rotary": Counter(
            {
                "RotaryEmbedding": p["ort-rotary"]
                * ("impl=standard" in text and {"fuse-rotary", "ort-attention"} <= set(names))
            }
        ),
        "ort-kernels": Counter({"FusedMatMul": p["FusedMatMul"], "QuickGelu": swish * ("fuse-activations" in names)}),
        "legalize": Counter(
            {
                "opset": 1,
                "RMSNormalization": p["RMSNormalization"] * ("fuse-norms" in names),
                "RotaryEmbedding": p["RotaryEmbedding"] * ("fuse-rotary" in names),
                "Swish": swish * ("fuse-activations" in names),
                "Gelu": gelu * ("fuse-activations" in names),
            }
        ),
    }
    return {n: +c for n, c in found.items() if n in names}


SHARED = Recipe((Layer(), Layer(shares=0)), head_dim=8, value_dim=8)
"""All that a kernel that writes the cache could want, but for a second reader of it."""


def check_sites(recipe: Recipe, request: Request, text: str) -> None:
    built = build(recipe)
    module = prepare(built.module, request)
    wanted = planted(built, request, text)
    with explained("P7 sites", module, pipeline=text, recipe=recipe, request=request):
        # How many products are joined depends on which read one value; the pass has tests of its own.
        runs: list[PassRun] = run_pipeline(module, Pipeline.parse(text.replace("fuse-products,", ""))).runs
        for run in runs:
            if run.id not in wanted:
                continue
            note(f"{run.id}: {dict(run.stats.fired)}")
            assert +run.stats.fired == wanted[run.id], run.id
            if run.id in built.missed:
                assert len(run.stats.missed) == built.missed[run.id], run.id
            assert all(m.reason and m.code and m.source for m in run.stats.missed), run.id


@scaled(0.6)
@rich()
@example((RICH[0], EDGE), ("onnxruntime", find_backend("onnxruntime").pipeline))
@example((SHARED, EDGE), ("onnxruntime", find_backend("onnxruntime").pipeline))
@given(cases(odd=False), stock_pipelines())
def test_p7_passes_fire_at_every_planted_site(case: tuple[Recipe, Request], stock: tuple[str, str]) -> None:
    check_sites(*case, stock[1])


def each_near_miss(test: Any) -> Any:
    """Decorator: the property is tried on every near miss first, alone in a decoder that could take all of them."""
    for odd in ODD:
        recipe = Recipe(
            head_dim=8, value_dim=8, rotary="half", bias=True, gemm=True, odd=odd,
            activation="gelu" if odd == "gelu-constant" else "swish",
        )  # fmt: skip
        test = example((recipe, EDGE), "onnxruntime")(test)
    return test


@scaled(0.6)
@each_near_miss
@given(
    recipes(odd=None, most_layers=2).flatmap(lambda r: st.tuples(st.just(r), requests(r, most_runs=1))),
    st.sampled_from(["onnxruntime", "ai100"]),
)
def test_p7_near_misses_are_left_alone_and_reported(case: tuple[Recipe, Request], target: str) -> None:
    check_sites(*case, find_backend(target).pipeline)


def test_the_weights_are_random() -> None:
    """Nothing here compares constants: every weight has some spread."""
    for name, tensor in weights(build(Recipe(bias=True, qk_norm=True, rotary="half")).module).items():
        assert isinstance(tensor, ir.Tensor)
        assert np.ptp(tensor.numpy()) > 0.01, name
