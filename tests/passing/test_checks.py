"""Every check that the manager makes catches a planted fault, at its level and with its exact message."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qeff_ir.errors import PassError
from qeff_ir.ir.module import WEIGHT_KEY, Dim, Module
from qeff_ir.ir.printer import to_text
from qeff_ir.passing import checks, properties
from qeff_ir.passing.base import Pass, Rewriter, registered_passes
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
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


def swap_weights(module: Module, rewriter: Rewriter) -> None:
    other = module.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    other.const_value, weight(module).const_value = weight(module).const_value, other.const_value


def rename_input(module: Module, rewriter: Rewriter) -> None:
    module.input("position_ids").name = "positions"


def reorder_outputs(module: Module, rewriter: Rewriter) -> None:
    module.graph.outputs.append(module.graph.outputs.pop(0))


def retype_output(module: Module, rewriter: Rewriter) -> None:
    module.output("logits").dtype = ir.DataType.FLOAT16


def shorten_context(module: Module, rewriter: Rewriter) -> None:
    module.dims["ctx_len"] = Dim("ctx_len", 64)


def drop_specialization(module: Module, rewriter: Rewriter) -> None:
    module.specializations.pop()


def swap_states(module: Module, rewriter: Rewriter) -> None:
    one, other = module.output("past_key.1_RetainedState"), module.output("past_value.1_RetainedState")
    one.name, other.name = "spare", one.name
    one.name = "past_value.1_RetainedState"


def change_meaning(module: Module, rewriter: Rewriter) -> None:
    body = next(f for f in module.model.functions.values() if f.name == "CacheUpdate")
    next(n for n in body if n.op_type == "GreaterOrEqual").op_type = "Greater"


def bypass(module: Module, rewriter: Rewriter) -> None:
    node = first(module, "Sigmoid")
    new = ir.node("Tanh", node.inputs)
    module.graph.insert_before(node, new)
    node.outputs[0].replace_all_uses_with(new.outputs[0])
    module.graph.remove(node)


def change_constant(module: Module, rewriter: Rewriter) -> None:
    value = first(module, "Add").inputs[1]
    assert value is not None and value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)


def claim_property(module: Module, rewriter: Rewriter) -> None:
    module.properties.add("legal")


IS_NOT = "although the pass does not declare changes_weights"
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
    (1, swap_weights, {}, f"[contract] '{WEIGHT}' is no longer the tensor that it was, {IS_NOT}"),
    (
        1,
        rename_input,
        {},
        "[contract] the pass changed the interface: 'in  %position_ids: int64[batch_size, seq_len]' is gone; "
        "'in  %positions: int64[batch_size, seq_len]' is new",
    ),
    (1, reorder_outputs, {}, "[contract] the pass changed the interface: its order is another"),
    (
        1,
        retype_output,
        {},
        "[contract] the pass changed the interface: 'out %logits: float[batch_size, seq_len, 97]' is gone; "
        "'out %logits: float16[batch_size, seq_len, 97]' is new",
    ),
    (
        1,
        shorten_context,
        {},
        "[contract] the pass changed the interface: 'dim ctx_len <= 256' is gone; 'dim ctx_len <= 64' is new",
    ),
    (
        1,
        drop_specialization,
        {},
        "[contract] the pass changed the interface: "
        "'specialization Decode: decode batch_size=2 ctx_len=48 seq_len=1' is gone",
    ),
    (
        1,
        swap_states,
        {},
        "[state-flow] the state output 'past_key.1_RetainedState' is not made of its input 'past_key.1'",
    ),
    (1, change_meaning, {}, "[contract] the pass changed the body of the op qeff.CacheUpdate"),
    (2, bypass, {}, "it changed the graph without reporting a rewrite, so it cannot be bisected"),
    (2, change_constant, {}, "it changed the graph without reporting a rewrite, so it cannot be bisected"),
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
    assert str(error.value).splitlines()[0] == f"pass made: {message}"
    assert to_text(module) == before
    run_pipeline(module, make(fault, **promises), check=level - 1)


def test_a_property_cannot_be_claimed_past_the_declaration(module: Module) -> None:
    (run,) = run_pipeline(module, make(claim_property), check=2).runs
    assert (module.properties, run.modified) == ({"canonical"}, False)


def test_other_weights_are_a_change_although_the_text_only_names_them(module: Module) -> None:
    before = to_text(module)
    (run,) = run_pipeline(module, make(copy_weight, changes_weights=True)).runs
    assert to_text(module) == before
    assert run.modified


def test_a_type_that_is_wrong_is_shown(module: Module) -> None:
    with pytest.raises(PassError) as error:
        run_pipeline(module, make(resize), check=2)
    line, caret = str(error.value).splitlines()[3:5]
    assert line.startswith(
        "  >   73 | %linear: float[batch_size, seq_len, 7] = MatMul(%mul_76, %val_63)  ; model.layers.0"
    )
    assert caret == "         | ^^^^^^^"
    assert str(error.value).splitlines()[-1].startswith("  hint: give a new node the shape and dtype of what it makes")


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
    return lambda module, rewriter: rewriter.constant(np.array(value, np.float32)) and None


def future(module: Module, rewriter: Rewriter) -> None:
    module.model.opset_imports[""] = 17


def sink(module: Module, rewriter: Rewriter) -> None:
    node = first(module, "Attention")
    node.op_type, node.domain = "SinkAttention", "qeff"


def raise_constant(module: Module, rewriter: Rewriter) -> None:
    rewriter.at(first(module, "Sigmoid"))("Constant", value_float=1.0)


def written_by(op_type: str) -> Run:
    def spoil(module: Module, rewriter: Rewriter) -> None:
        registered_passes()  # among them those of the targets, whose layouts these are
        node = first(module, "Sigmoid")
        rewriter.at(node)(op_type, node.inputs[0])

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "problem"),
    [
        ("scatter-layout", written_by("TensorScatter"), "TensorScatter 'val_0' writes a cache"),
        ("tensor-scatter-layout", written_by("CtxScatter"), "CtxScatter 'val_0' writes a cache"),
        ("canonical", stutter, "Identity 'val_0' of model.layers.0.mlp.act_fn does nothing"),
        ("fp16-range", constant(1e6), "the constant 'const.float32.scalar.b1d4fbb2' is beyond ±65504"),
        ("last-logits", nothing, "the logits have the shape [batch_size,seq_len,97]"),
        ("legal", future, LATER),
        ("states-lowered", nothing, "CachePositions 'cache_positions' of model is left"),
        ("attention-lowered", sink, "SinkAttention 'attention' of model.layers.0.self_attn is left"),
        ("canonical", raise_constant, "Constant 'val_0' of model.layers.0.mlp.act_fn is no initializer"),
    ],
)
def test_each_property_has_a_checker_that_fails(module: Module, name: str, spoil: Run, problem: str) -> None:
    spoil(module, Rewriter(module, "made"))
    assert properties.problem(name, module) == problem


def test_every_property_has_a_fault() -> None:
    registered_passes()
    test: Any = test_each_property_has_a_checker_that_fails
    marks = test.pytestmark
    assert {values[0] for mark in marks for values in mark.args[1]} == set(properties.PROPERTIES)


ELSEWHERE = {"_check_expectation": "test_expect", "_check_text": "test_text_that_saving_changes_is_caught"}
"""Checks whose faults do not fit the table, with the tests that plant them."""


def test_every_check_has_a_fault(module: Module) -> None:
    """Every function of `checks` that can raise is reached by the table above, or is named with its test."""
    reached: set[str] = set()
    for level, fault, promises, _ in FAULTS:
        with pytest.raises(PassError) as error:
            run_pipeline(module.clone(), make(fault, **promises), check=level)
        assert error.value.__cause__ is not None
        frames = traceback.extract_tb(error.value.__cause__.__traceback__)
        reached.update(f.name for f in frames if f.filename == checks.__file__)
    raising = {n for n, f in vars(checks).items() if n.startswith("_check_") and "raise " in inspect.getsource(f)}
    assert raising - reached == set(ELSEWHERE)


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
