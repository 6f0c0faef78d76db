"""Every check that the manager makes catches a planted fault, at its level and with its exact message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qeff_ir.errors import PassError
from qeff_ir.module import WEIGHT_KEY, Module
from qeff_ir.passing import properties
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.printer import to_text
from tests import support

Run = Callable[[Module, Rewriter], None]
LATER = (
    "ReduceMean 'mean' of model.layers.0.input_layernorm has the attribute 'noop_with_empty_axes', "
    "which opset 17 does not know"
)
WEIGHT = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def module() -> Module:
    return support.canonical("llama")


def make(run: Run, **promises: object) -> Pipeline:
    @dataclass(frozen=True, slots=True)
    class Made(Pass):
        name: ClassVar[str] = "made"

        def run(self, module: Module, rewriter: Rewriter) -> None:
            run(module, rewriter)

    for name, value in promises.items():
        setattr(Made, name, value)
    return Pipeline((Made(),))


def nothing(module: Module, rewriter: Rewriter) -> None:
    """Changes nothing."""


def weight(module: Module) -> ir.Value:
    return module.graph.initializers[WEIGHT]


def copy_weight(module: Module, rewriter: Rewriter) -> None:
    tensor = weight(module).const_value
    assert tensor is not None
    weight(module).const_value = ir.tensor(np.array(tensor.numpy()), name=WEIGHT)


def add_weight(module: Module, rewriter: Rewriter) -> None:
    rewriter.constant(np.arange(300, dtype=np.float32))


def drop_weight(module: Module, rewriter: Rewriter) -> None:
    other = module.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    for node in [n for n, _ in weight(module).uses()]:
        rewriter.substitute(node, rewriter.at(node)("Transpose", other, perm=[1, 0]))
    del module.graph.initializers[WEIGHT]


def first(module: Module, op_type: str) -> ir.Node:
    return next(n for n in module.graph if n.op_type == op_type)


def retype(module: Module, rewriter: Rewriter) -> None:
    rewriter.rewrite("retype")
    first(module, "MatMul").outputs[0].dtype = ir.DataType.FLOAT16


def resize(module: Module, rewriter: Rewriter) -> None:
    rewriter.rewrite("resize")
    first(module, "MatMul").outputs[0].shape = ir.Shape(["batch_size", "seq_len", 7])


def misuse(module: Module, rewriter: Rewriter) -> None:
    node = first(module, "Sigmoid")
    rewriter.replace(node, rewriter.at(node)("Not", *node.inputs))


def stutter(module: Module, rewriter: Rewriter) -> None:
    node = first(module, "Sigmoid")
    rewriter.replace(node, rewriter.at(node)("Sigmoid", rewriter.at(node)("Identity", *node.inputs)))


def grow(module: Module, rewriter: Rewriter) -> None:
    node = first(module, "Sigmoid")
    rewriter.replace(node, rewriter.at(node)("Sigmoid", rewriter.at(node)("Neg", *node.inputs)))


def silent(module: Module, rewriter: Rewriter) -> None:
    node = first(module, "Sigmoid")
    rewriter.substitute(node, rewriter.at(node)("Tanh", *node.inputs))


FAULTS: list[tuple[int, Run, dict[str, Any], str]] = [
    (
        1,
        copy_weight,
        {},
        f"[contract] '{WEIGHT}' is no longer the tensor that it was, although the pass does not declare "
        "changes_weights",
    ),
    (
        1,
        add_weight,
        {},
        "[contract] 'const.float32.300.ac1ff07a' is new, with 1200 bytes, although the pass does not declare "
        "changes_weights",
    ),
    (1, drop_weight, {}, f"[contract] '{WEIGHT}' is gone, although the pass does not declare changes_weights"),
    (2, retype, {}, "[types] 'linear' is declared FLOAT16 but is FLOAT"),
    (2, resize, {}, "[types] 'linear' is declared [batch_size,seq_len,7] but has the sizes [None, None, 32]"),
    (
        2,
        stutter,
        {},
        "it destroys 'canonical' without declaring that it invalidates it: Identity 'val_0' of "
        "model.layers.0.mlp.act_fn does nothing",
    ),
    (
        2,
        nothing,
        {"establishes": frozenset({"states-lowered"})},
        "it declares that it establishes 'states-lowered', but CachePositions 'cache_positions' of model is left",
    ),
    (2, silent, {}, "it changed the graph without reporting a rewrite, so it cannot be bisected"),
    (2, grow, {"idempotent": True}, "it is declared idempotent, but a second run changes the graph again"),
]


@pytest.mark.parametrize(("level", "fault", "promises", "message"), FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_a_planted_fault_is_caught_at_its_level_only(
    module: Module, level: int, fault: Run, promises: dict[str, Any], message: str
) -> None:
    before = to_text(module)
    with pytest.raises(PassError) as error:
        run_pipeline(module, make(fault, **promises), check=level)
    assert str(error.value) == f"pass made: {message}"
    assert to_text(module) == before
    run_pipeline(module, make(fault, **promises), check=level - 1)


def test_shape_inference_names_a_misused_operator(module: Module) -> None:
    with pytest.raises(PassError, match=r"pass made: \[types\] shape inference refuses the graph: .*Not"):
        run_pipeline(module, make(misuse), check=2)


def test_text_that_saving_changes_is_caught(module: Module) -> None:
    def lossy(proto: onnx.ModelProto) -> ir.Model:
        del proto.graph.node[0].metadata_props[:]
        return ir.serde.deserialize_model(proto)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ir, "from_proto", lossy)
        with pytest.raises(PassError) as error:
            run_pipeline(module, make(nothing), check=3)
    line = next(line for line in to_text(module).splitlines() if line.startswith("%"))
    assert str(error.value) == f"pass made: [text] saving changes the line '{line}' to '{line.partition('  ;')[0]}'"


def test_tied_weights_stay_tied(module: Module) -> None:
    graph = module.graph
    tied = ir.val("tied", const_value=weight(module).const_value)
    tied.metadata_props[WEIGHT_KEY] = "tied"
    graph.register_initializer(tied)
    run_pipeline(module, make(nothing))
    with pytest.raises(PassError) as error:
        run_pipeline(module, make(copy_weight))
    assert str(error.value).startswith(f"pass made: [contract] '{WEIGHT}' is no longer the tensor that it was")


@pytest.mark.parametrize("change", [copy_weight, add_weight, drop_weight])
def test_declared_changes_of_weights_are_taken(module: Module, change: Run) -> None:
    run_pipeline(module, make(change, changes_weights=True))


def test_a_declared_destruction_is_taken(module: Module) -> None:
    run_pipeline(module, make(stutter, invalidates=frozenset({"canonical"})), check=2)
    assert "canonical" not in module.properties


def constant(value: float) -> Run:
    return lambda module, rewriter: rewriter.constant(np.float32(value)) and None


def future(module: Module, rewriter: Rewriter) -> None:
    module.model.opset_imports[""] = 17


@pytest.mark.parametrize(
    ("name", "spoil", "problem"),
    [
        ("canonical", stutter, "Identity 'val_0' of model.layers.0.mlp.act_fn does nothing"),
        ("fp16-range", constant(1e6), "the constant 'const.float32.scalar.b1d4fbb2' is beyond ±65504"),
        ("last-logits", nothing, "the logits have the shape [batch_size,seq_len,97]"),
        ("legal", future, LATER),
    ],
)
def test_each_property_has_a_checker_that_fails(module: Module, name: str, spoil: Run, problem: str) -> None:
    spoil(module, Rewriter(module, "made"))
    assert properties.problem(name, module) == problem


def test_an_unknown_property_is_taken_at_its_word(module: Module) -> None:
    run_pipeline(module, make(nothing, establishes=frozenset({"blue"})), check=3)
    assert properties.problem("blue", module) is None


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_the_stock_pipelines_hold_at_level_three(name: str, target: str) -> None:
    module = support.canonical(name)
    run_pipeline(module, Pipeline.parse(support.rest_of(target)), check=3)
    for held in module.properties:
        assert properties.PROPERTIES[held].problem(module) is None
