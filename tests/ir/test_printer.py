"""The text form: stable, readable, and different whenever the module is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.ir.module import Dim, Module, Specialization
from qeff_ir.ir.printer import fingerprint, to_text
from tests import support
from tests.models import build


def test_the_text_form_is_that_of_its_documentation() -> None:
    lines = to_text(support.canonical("llama")).splitlines()
    assert lines[0] == "module LlamaForCausalLM (qeff 1, standard 24)"
    assert "dim ctx_len <= 256" in lines
    assert "state past_key.0: float[batch_size, 2, ctx_len, 8]" in lines
    assert "in  %input_ids: int64[batch_size, seq_len]" in lines
    assert "weight %lm_head.weight: float[97, 32]" in lines
    assert "out %logits: float[batch_size, seq_len, 97]" in lines
    assert "specialization Decode: decode batch_size=2 ctx_len=48 seq_len=1" in lines
    attention = [line for line in lines if " = Attention(" in line]
    assert len(attention) == 2
    assert attention[1].endswith("  ; model.layers.1.self_attn")


def test_windows_are_told() -> None:
    text = to_text(support.canonical("mistral"))
    assert "state past_key.0: float[batch_size, 2, ctx_len, 8] window=6" in text.splitlines()


def test_lowering_twice_gives_the_same_text() -> None:
    """Another object, other weights, the same text: no id, address, set order or weight is in it."""
    other = Source(Memory(build("llama", seed=5)[1])).lower()
    assert to_text(other) == to_text(support.lowered("llama"))
    assert fingerprint(other) == fingerprint(support.lowered("llama"))


def test_a_clone_has_the_same_text_and_does_not_share_its_graph() -> None:
    module = support.canonical("llama")
    copy = module.clone()
    assert to_text(copy) == to_text(module)
    next(n for n in copy.graph if n.op_type == "Add").op_type = "Sub"
    assert to_text(copy) != to_text(module)


def _node(module: Module, op_type: str) -> ir.Node:
    return next(n for n in module.graph if n.op_type == op_type)


def another_operator(module: Module) -> None:
    _node(module, "Add").op_type = "Sub"


def another_attribute(module: Module) -> None:
    _node(module, "Attention").attributes["scale"] = ir.AttrFloat32("scale", 0.36)


def another_edge(module: Module) -> None:
    node = _node(module, "Attention")
    node.replace_input_with(2, node.inputs[1])


def another_order(module: Module) -> None:
    node = _node(module, "Add")
    one, two = node.inputs
    node.replace_input_with(0, two)
    node.replace_input_with(1, one)


def another_constant(module: Module) -> None:
    value = next(v for v in module.graph.initializers.values() if isinstance(v.const_value, ir.Tensor))
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() + np.ones(1, value.const_value.numpy().dtype))


def another_shape(module: Module) -> None:
    module.output("logits").shape = ir.Shape(["batch_size", 1, 97])


def another_state(module: Module) -> None:
    module.residents[0] = dataclasses.replace(module.residents[0], ring=True)


def another_bound(module: Module) -> None:
    module.dims["ctx_len"] = Dim("ctx_len", 255)


def another_specialization(module: Module) -> None:
    module.specializations[0] = Specialization(
        "Prefill", "prefill", {**module.specializations[0].symbols, "ctx_len": 47}
    )


def another_phase(module: Module) -> None:
    module.specializations[0] = dataclasses.replace(module.specializations[0], phase="decode")


def another_property(module: Module) -> None:
    module.properties.add("more")


def another_opset(module: Module) -> None:
    module.model.opset_imports[""] = 23


@pytest.mark.parametrize(
    "change",
    [
        another_operator, another_attribute, another_edge, another_order, another_constant, another_shape,
        another_state, another_bound, another_specialization, another_phase, another_property, another_opset,
    ],
)  # fmt: skip
def test_every_change_shows(change: Callable[[Module], None]) -> None:
    module = support.canonical("llama")
    before = fingerprint(module)
    change(module)
    assert fingerprint(module) != before


def test_large_constants_are_told_apart_by_their_digest() -> None:
    module = support.canonical("llama")
    value = ir.val("big", const_value=ir.tensor(np.arange(100.0), name="big"))
    module.graph.register_initializer(value)
    before = to_text(module)
    assert "sha256:" in before
    numbers = np.arange(100.0)
    numbers[57] += 1e-9
    value.const_value = ir.tensor(numbers, name="big")
    assert to_text(module) != before


def test_origins_can_be_left_out() -> None:
    module = support.canonical("llama")
    assert "model.layers.1.self_attn" in to_text(module).replace("model.layers.1.self_attn.", "")
    assert ";" not in to_text(module, origins=False)
