"""Products of one value become one: both targets answer as before, on the weights of the checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from backends.ai100.sub_functions import outline
from passes.fuse_products import FuseProducts
from qeff_ir.cost import Storage, cost
from qeff_ir.debug.recorder import Recorder
from qeff_ir.debug.report_html import to_html
from qeff_ir.errors import PassError
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.sources import set_sources, source_text, sources_of
from qeff_ir.passing import Pipeline, Rewriter, run_pipeline
from qeff_ir.passing.weights import Stored, derived, parameters, side_by_side, stored
from qeff_ir.quantized import dequantized, quantized
from qeff_ir.ranges import FileRange
from tests import support
from tests.adapters.random_adapters import base, make

WRITTEN = FuseProducts("written")


def fused(name: str, target: str, step: FuseProducts, *, check: int = 1) -> Module:
    module = support.canonical(name)
    rest = Pipeline.parse(support.rest_of(target))
    others = Pipeline(tuple(item for _, item in rest if item.name != step.name))
    run_pipeline(module, others.insert_before("kv-retention", step), check=check)
    return module


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize(
    ("name", "products", "step"),
    [
        ("llama", [2, 3], FuseProducts()),
        ("llama", [2, 3], WRITTEN),
        ("gpt-oss", [3], WRITTEN),
        ("falcon-h1", [2, 3], WRITTEN),
    ],
)
def test_it_answers_as_before(name: str, products: list[int], target: str, step: FuseProducts, tmp_path: Path) -> None:
    module = fused(name, target, step, check=2)
    splits = [node for node in module.graph if node.op_type == "Split" and "fuse-products" in str(node.metadata_props)]
    assert sorted({len(node.outputs) for node in splits}) == products
    support.answers_alike(module, support.canonical(name), target, tmp_path)


def test_every_check_passes_and_the_weights_are_the_old_ones_side_by_side() -> None:
    initializers = support.canonical("llama").graph.initializers.values()
    named = [v for v in initializers if WEIGHT_KEY in v.metadata_props]
    before = {v.metadata_props[WEIGHT_KEY]: v.const_value for v in named}
    module = fused("llama", "onnxruntime", WRITTEN, check=4)
    name = "model.layers.1.mlp.gate_proj_and_up_proj.weight"
    new = module.graph.initializers[name].const_value
    parts = [before[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert new is not None and np.array_equal(new.numpy(), np.concatenate([p.numpy() for p in parts if p is not None]))
    gone = set(before) - {v.metadata_props.get(WEIGHT_KEY) for v in module.graph.initializers.values()}
    assert len(gone) == 2 * 5  # what nothing reads any more is not in the package


def tensors(module: Module) -> dict[str, object]:
    named = [v for v in module.graph.initializers.values() if WEIGHT_KEY in v.metadata_props]
    return {v.metadata_props[WEIGHT_KEY]: v.const_value for v in named}


def test_weights_that_are_referenced_are_the_checkpoints_and_read_as_it_stores_them() -> None:
    module = fused("llama", "onnxruntime", FuseProducts(), check=4)
    assert tensors(module) == tensors(support.canonical("llama"))  # the tensors themselves
    joined = [node for node in module.graph if node.op_type == "Concat" and len(sources_of(node)) > 1]
    readers = [user.op_type for node in joined for user in node.outputs[0].consumers()]
    assert readers == ["FusedMatMul"] * 2 * 2
    counts = [cost(m, m.specializations[1], Storage(4, 1)) for m in (module, fused("llama", "onnxruntime", WRITTEN))]
    assert len({(c.weight_bytes, c.multiply_adds, c.resident_bytes) for c in counts}) == 1


def test_a_weight_of_two_products_and_one_that_is_stored_the_other_way_stay_alone() -> None:
    module = support.canonical("llama")
    rewriter = Rewriter(module, "test")
    products = [node for node in module.graph if stored(node) is not None]
    gate, up, queries, keys = (
        next(node for node in products if source_text(node).endswith(f"layers.0.{name}_proj"))
        for name in ("mlp.gate", "mlp.up", "self_attn.q", "self_attn.k")
    )
    again = rewriter.at(gate)("MatMul", gate.inputs[0], gate.inputs[1])
    rewriter.substitute(gate, rewriter.at(gate)("Add", rewriter.at(gate)("MatMul", *gate.inputs), again))
    part = stored(keys)
    assert part is not None
    turned = derived(rewriter, "turned", [part.value], part.features, lambda array: array.T)
    keys.replace_input_with(1, turned)
    fired = run_pipeline(module, Pipeline((FuseProducts(),)), check=2).runs[0].stats.fired
    assert fired == {"2 products": 2, "3 products": 1}
    assert {node in module.graph for node in (up, keys)} == {True} and queries not in module.graph


def test_quantized_weights_are_joined_with_those_of_the_same_kind() -> None:
    module = support.canonical("llama")
    run = run_pipeline(module, Pipeline.parse('quantize-weights{skip="*gate_proj*"},fuse-products')).runs[1]
    assert run.stats.fired == {"3 products": 2} and run.stats.missed == []
    joined = [v for v in module.graph.initializers.values() if len(parameters(v)) == 3]
    assert len(joined) == 2 and all(quantized(value.const_value) is not None for value in joined)


def test_codes_of_a_checkpoint_stay_where_they_are(tmp_path: Path) -> None:
    module = support.canonical("llama")
    run_pipeline(module, Pipeline.parse("quantize-weights{bits=8}"))
    for number, value in enumerate(module.graph.initializers.values()):
        parts = quantized(value.const_value)
        if parts is not None:
            file, codes, name = tmp_path / str(number), parts.codes.numpy(), str(value.name)
            file.write_bytes(codes.tobytes())
            place = FileRange(file, 0, codes.nbytes, parts.codes.dtype, codes.shape)
            value.const_value = dequantized(name, dataclasses.replace(parts, codes=place.tensor(name)))
    (run,) = run_pipeline(module.clone(), Pipeline((FuseProducts(),))).runs
    assert run.stats.fired == {} and run.stats.missed == []
    (run,) = run_pipeline(module, Pipeline((WRITTEN,))).runs
    assert run.stats.fired == {"3 products": 2, "2 products": 2}


def test_what_a_fused_product_stands_for_is_told_everywhere() -> None:
    module = support.canonical("llama")
    recorder = Recorder()
    run_pipeline(module, Pipeline((WRITTEN,)), instruments=[recorder])
    one = "model.layers.1.mlp.gate_proj+up_proj"
    both = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    assert f"; {one} <- fuse-products" in to_text(module)
    (origin,) = [entry for entry in recorder.data["origins"] if entry["source"] == one]
    assert (origin["sources"], origin["ops"]["MatMul"], origin["ops"]["Split"]) == (both, 1, 1)
    (run,) = recorder.data["passes"]
    assert [list(c["sources"]) for c in run["diff"]["nodes"] if c["op"] == "Split" and c["source"] == one] == [both]
    assert one in to_html(recorder.data)
    (weight,) = [value for value in module.graph.initializers.values() if f"{both[0]}.weight" in parameters(value)]
    assert parameters(weight) == tuple(f"{path}.weight" for path in both)
    again = derived(Rewriter(module, "test"), "twice", [weight, weight], (1,), np.add)
    assert parameters(again) == parameters(weight)


@pytest.mark.parametrize("step", [FuseProducts(), WRITTEN], ids=lambda step: step.weights)
def test_adapters_of_layers_that_are_fused_are_told_of(step: FuseProducts) -> None:
    module = support.canonical("llama")
    report = run_pipeline(module, Pipeline((step, *Pipeline.parse("lora").passes)))
    told = [missed.reason.partition(" ")[0] for missed in report.runs[-1].stats.missed]
    own = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert told == [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in own]
    assert {str(adapter.path).rpartition(".")[2] for adapter in module.adapters} == {"o_proj", "down_proj"}
    module = support.canonical("llama")
    report = run_pipeline(module, Pipeline((step, *Pipeline.parse('lora{targets="up_proj,down_proj"}').passes)))
    assert [m.source for m in report.runs[-1].stats.missed] == [
        f"model.layers.{n}.mlp.gate_proj+up_proj" for n in (0, 1)
    ]
    plain = support.apply(support.canonical("llama"), "lora")
    assert plain.runs[-1].stats.missed == []


def test_an_adapter_cannot_be_merged_into_layers_that_are_fused(tmp_path: Path) -> None:
    make(base("llama"), tmp_path, 0, r=4, target_modules=["up_proj"])
    steps = (FuseProducts(), *Pipeline.parse(f'merge-lora{{adapter="{tmp_path}"}}').passes)
    with pytest.raises(PassError, match=r"up_proj, which the model does not have: put merge-lora before the pass"):
        run_pipeline(support.canonical("llama"), Pipeline(steps))


@pytest.mark.parametrize("others", [1, 2])
def test_a_node_of_several_layers_belongs_to_none(others: int) -> None:
    """It belongs to a function of a layer only where all its sources do."""
    module = fused("llama", "ai100", WRITTEN)
    product = next(node for node in module.graph if "mlp" in source_text(node) and len(sources_of(node)) > 1)
    set_sources(product, [*sources_of(product), *([] if others == 1 else ["model.layers.1.mlp.up_proj"])])
    outline(module.model, {"position_ids"})
    assert (product in module.graph) is (others == 2)


def weights(module: Module) -> list[Stored]:
    return [found for node in module.graph if (found := stored(node)) is not None]


@pytest.mark.parametrize("flip", [False, True])
def test_weights_that_are_stored_in_different_ways_stand_side_by_side(flip: bool) -> None:
    module = support.canonical("llama")
    rewriter = Rewriter(module, "test")
    one, other = (w for w in weights(module)[:3] if w.features == weights(module)[1].features)
    turned = derived(rewriter, "turned", [other.value], other.features, lambda array: array.T)
    parts = [one, Stored(turned, False)]
    both = side_by_side(rewriter, "both", parts[::-1] if flip else parts)
    assert both.transposed is not flip and both.features == (one.features[0], 2 * one.features[1])
    numbers = [p.value.const_value.numpy() for p in (one, other) if p.value.const_value is not None]
    made = both.value.const_value
    assert made is not None
    expected = np.concatenate(numbers[::-1] if flip else numbers)
    assert np.array_equal(made.numpy().T if flip else made.numpy(), expected) and expected.std() > 0


def test_what_cannot_be_derived_is_refused() -> None:
    module = support.canonical("llama")
    rewriter = Rewriter(module, "test")
    first = weights(module)[0]
    with pytest.raises(PassError, match=r"there is a weight .* already"):
        derived(rewriter, str(first.value.name), [first.value], (1,), lambda a: a)
    with pytest.raises(PassError, match="x cannot be derived: it is computed from nothing"):
        derived(rewriter, "x", [], (1,), lambda: np.zeros(1))
    with pytest.raises(PassError, match="x cannot be derived: input_ids has no numbers"):
        derived(rewriter, "x", [module.graph.inputs[0]], (1,), lambda a: a)
    wrong = derived(rewriter, "wrong", [first.value], (1, 2), lambda a: a)
    with pytest.raises(PassError, match=r"wrong was said to be \[1, 2\], and is \[32, 32\]"):
        wrong.const_value.numpy()  # pyright: ignore[reportOptionalMemberAccess]
    down = next(w for w in weights(module) if w.features[0] != first.features[0])
    with pytest.raises(PassError, match="take different numbers of features"):
        side_by_side(rewriter, "both", [first, down])
