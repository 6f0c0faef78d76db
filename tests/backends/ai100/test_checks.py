"""Kill tests of the checks on the IR: each damage is found by its code, and names the Hugging Face module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from backends.ai100 import checks, sdk
from backends.ai100.backend import BACKEND
from backends.ai100.options import Ai100Options
from qeff_ir.errors import CompileError
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.tasks import EMBEDDING
from qeff_ir.ir.module import SOURCE_KEY, Module, Specialization
from qeff_ir.specialize import specialize
from tests.encoders import build

from .conftest import OPTIONS, Tiny

TARGET = sdk.description("1.22")
SOURCE = "model.layers.1.mlp"


def found(module: Module, options: Ai100Options = OPTIONS) -> list[str]:
    return [str(v) for v in checks.violations(module, options, TARGET)]


def append(module: Module, op: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None) -> None:
    node = ir.node(op, inputs, metadata_props={SOURCE_KEY: SOURCE})
    if dtype is not None:
        node.outputs[0].dtype = dtype
    module.graph.append(node)


def _trilu(m: Module) -> None:
    append(m, "Trilu", m.input("past_key.0"), m.input("position_ids"))


def _constant(number: float) -> Callable[[Module], None]:
    def change(m: Module) -> None:
        value = ir.val("big", const_value=ir.tensor(np.array([number], np.float32), name="big"))
        m.graph.register_initializer(value)
        append(m, "Neg", value)

    return change


def _function(op: str) -> Callable[[Module], None]:
    def change(m: Module) -> None:
        inputs = [ir.val(n) for n in "abc"]
        body = ir.node(op, inputs[: 1 if op == "ConstantOfShape" else 3], metadata_props={SOURCE_KEY: SOURCE})
        function = ir.Function("local", "Layer", graph=ir.Graph(inputs, body.outputs, nodes=[body]), attributes=[])
        m.model.functions[function.identifier()] = function

    return change


def _drop_symbol(m: Module) -> None:
    first, second = m.specializations
    m.specializations = [
        first,
        Specialization("Decode", "decode", {k: v for k, v in second.symbols.items() if k != "sliding_window"}),
    ]


def _repeat(m: Module) -> None:
    m.specializations.append(Specialization("Again", "prefill", m.specializations[0].symbols))


def _rename_state(m: Module) -> None:
    m.output("past_value.1_RetainedState").name = "past_value.1_Kept"


def _swap(m: Module) -> None:
    m.graph.outputs[:] = [m.graph.outputs[1], m.graph.outputs[0], *m.graph.outputs[2:]]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: append(m, "NonZero", m.input("input_ids")), "op"),
        (lambda m: append(m, "SequenceConstruct", m.input("input_ids")), "sequence-op"),
        (_trilu, "trilu-diagonal"),
        (lambda m: append(m, "Cast", m.input("past_key.0"), dtype=ir.DataType.DOUBLE), "type"),
        (_constant(1e5), "fp16-range"),
        (_constant(-1e5), "fp16-range"),
        (_function("Range"), "function-constant"),
        (_function("ReduceSum"), "function-constant"),
        (_function("ConstantOfShape"), "function-constant"),
        (_function("Slice"), "function-constant"),
    ],
)
def test_a_damaged_graph_is_found_and_located(tiny: Tiny, change: Callable[[Module], None], code: str) -> None:
    module = tiny.module.clone()
    change(module)
    messages = found(module)
    assert messages and all(m.startswith(f"[{code}]") and SOURCE in m for m in messages)


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (_drop_symbol, {"symbol"}),
        (_repeat, {"duplicate-specialization"}),
        (lambda m: m.specializations.clear(), {"specializations"}),
        (_rename_state, {"state-pair", "outputs"}),
        (_swap, {"outputs"}),
        (lambda m: m.model.opset_imports.update({"": 24}), {"opset"}),
        (lambda m: m.properties.discard("legal"), {"lowered"}),
    ],
)
def test_a_damaged_module_is_found(tiny: Tiny, change: Callable[[Module], None], codes: set[str]) -> None:
    module = tiny.module.clone()
    change(module)
    assert {m.partition("]")[0][1:] for m in found(module)} == codes


def _bounded(module: Module) -> ir.Node:
    """Put a slice with constant bounds into a function."""
    _function("Slice")(module)
    (body,) = module.model.functions["local", "Layer", ""]
    for index in (1, 2):
        body.replace_input_with(index, ir.val("k", const_value=ir.tensor([1], name="k")))
    return body


def test_constant_bounds_inside_functions_pass(tiny: Tiny) -> None:
    module = tiny.module.clone()
    _bounded(module)
    assert found(module) == []


def test_computed_axes_inside_functions_are_found(tiny: Tiny) -> None:
    module = tiny.module.clone()
    body = _bounded(module)
    body.resize_inputs(4)
    body.replace_input_with(3, module.model.functions["local", "Layer", ""].inputs[2])
    (message,) = found(module)
    assert message.startswith("[function-constant]") and "axes" in message


def test_a_large_constant_inside_a_node_is_found(tiny: Tiny) -> None:
    target = dataclasses.replace(TARGET, limits=dataclasses.replace(TARGET.limits, protobuf_bytes=100))
    module = tiny.module.clone()
    module.graph.append(ir.node("Constant", [], {"value": ir.tensor(np.zeros(100, np.float32))}))
    assert [v.code for v in checks.violations(module, OPTIONS, target)] == ["protobuf-size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Ai100Options(num_cores=17), r"\[cores\] num_cores is 17: a device has 1 to 16"),
        (Ai100Options(num_cores=0), r"\[cores\]"),
        (Ai100Options(num_devices=33), r"\[devices\]"),
        (Ai100Options(prefill_seq_len=256), r"\[context\] prefill_seq_len is 256, more than the 128 slots"),
        (Ai100Options(flags={"mxfp6": True}), "has no flag mxfp6"),
    ],
)
def test_options_are_refused_before_lowering(options: Ai100Options, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        BACKEND.check_options(options)


def test_a_model_without_a_cache_has_none_to_compress() -> None:
    module = ForwardSource(Memory(build("distilbert")), ForwardOptions(EMBEDDING)).lower()
    options = Ai100Options(batch_size=2, seq_len=(8,), mxint8_kv_cache=True)
    specialize(module, options)
    told = f"[kv-cache] {module.name} has no KV cache to compress: leave out mxint8_kv_cache"
    assert told in found(module, options)
    assert told not in found(module, dataclasses.replace(options, mxint8_kv_cache=False))
