"""Every rule of the verifier is broken once, and told by its code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import onnx_ir as ir
import pytest

from qeff_ir import verifier
from qeff_ir.errors import VerificationError
from qeff_ir.module import AdapterInput, Dim, Module, Specialization
from qeff_ir.verifier import verify
from tests import support
from tests.models import MODELS

FAULTS: list[tuple[str, str, Callable[[Module], None]]] = []


def fault(code: str, message: str) -> Callable[[Callable[[Module], None]], Callable[[Module], None]]:
    def register(plant: Callable[[Module], None]) -> Callable[[Module], None]:
        FAULTS.append((code, message, plant))
        return plant

    return register


def first(module: Module, op_type: str) -> ir.Node:
    return next(n for n in module.graph if n.op_type == op_type)


@fault("order", "before it is defined")
def node_before_its_input(module: Module) -> None:
    node = first(module, "Add")
    module.graph.remove(node)
    module.graph.insert_before(module.graph[0], node)


@fault("order", "before it is defined")
def dangling_value(module: Module) -> None:
    first(module, "MatMul").replace_input_with(0, ir.val("gone"))


@fault("order", "made by no node")
def output_of_nothing(module: Module) -> None:
    old = module.output("logits")
    old.name = "old"
    module.graph.outputs[0] = ir.val("logits", shape=old.shape, dtype=old.dtype)


@fault("names", "two values are named")
def two_values_of_one_name(module: Module) -> None:
    nodes = [n for n in module.graph if n.op_type == "Mul"]
    nodes[1].outputs[0].name = nodes[0].outputs[0].name


@fault("names", "two values are named")
def node_named_like_an_input(module: Module) -> None:
    first(module, "Mul").outputs[0].name = "input_ids"


@fault("operator", "does not exist in opset")
def unknown_operator(module: Module) -> None:
    first(module, "Mul").op_type = "Mull"


@fault("operator", "does not exist in opset 18")
def operator_of_a_later_opset(module: Module) -> None:
    module.model.opset_imports[""] = 18


@fault("operator", "which is not imported")
def domain_without_import(module: Module) -> None:
    first(module, "Mul").domain = "elsewhere"


@fault("operator", "has no body")
def dialect_without_body(module: Module) -> None:
    module.model.functions.clear()


@fault("interface", "has no type or no shape")
def input_without_shape(module: Module) -> None:
    module.input("position_ids").shape = None


@fault("interface", "which the module does not declare")
def undeclared_dim(module: Module) -> None:
    module.input("position_ids").shape = ir.Shape(["batch_size", "tokens"])


@fault("interface", "which the module does not declare")
def anonymous_dim(module: Module) -> None:
    module.output("logits").shape = ir.Shape([None, "seq_len", 97])


@fault("state-pair", "has no output 'past_value.1_RetainedState'")
def state_without_output(module: Module) -> None:
    module.output("past_value.1_RetainedState").name = "value_1"


@fault("state-pair", "has no input 'past_key.0'")
def state_without_input(module: Module) -> None:
    module.input("past_key.0").name = "key_0"


@fault("state-pair", "its state says")
def state_of_another_type(module: Module) -> None:
    module.states[0] = dataclasses.replace(module.states[0], dtype=ir.DataType.FLOAT16)


@fault("state-pair", "its state says")
def state_of_another_shape(module: Module) -> None:
    module.states[0] = dataclasses.replace(module.states[0], shape=("batch_size", 4, "ctx_len", 8))


@fault("state-pair", "the module declares none")
def undeclared_state(module: Module) -> None:
    module.states.pop()


@fault("state-roles", "not ordered")
def values_before_keys(module: Module) -> None:
    module.states[0], module.states[1] = module.states[1], module.states[0]


@fault("state-roles", "each once")
def state_declared_twice(module: Module) -> None:
    module.states.append(module.states[-1])


@fault("dims", "gives no size to 'seq_len'")
def specialization_without_a_dim(module: Module) -> None:
    module.specializations = [Specialization("Decode", {"batch_size": 1, "ctx_len": 8})]


@fault("dims", "gives no size to 'batch_size'")
def specialization_of_size_zero(module: Module) -> None:
    module.specializations = [Specialization("Decode", {"batch_size": 0, "ctx_len": 8, "seq_len": 1})]


@fault("dims", "same name")
def two_specializations_of_one_name(module: Module) -> None:
    module.specializations = [module.specializations[0]] * 2


@fault("bounds", "asks for ctx_len=48, the model takes at most 32")
def context_beyond_the_model(module: Module) -> None:
    module.dims["ctx_len"] = Dim("ctx_len", 32)


@fault("adapter", "'q.lora_a_weights' has no input of the shape [2, 32, 4]")
def adapter_without_its_input(module: Module) -> None:
    module.adapters = [AdapterInput("q.lora_a_weights", "q", "a", (2, 32, 4), slots=True, retained=False)]


@pytest.mark.parametrize(("code", "message", "plant"), [pytest.param(*f, id=f[2].__name__) for f in FAULTS])
def test_a_broken_rule_is_told_by_its_code(code: str, message: str, plant: Callable[[Module], None]) -> None:
    module = support.canonical("llama")
    verify(module)
    plant(module)
    with pytest.raises(VerificationError, match=re.escape(message)) as error:
        verify(module)
    assert error.value.code == code
    assert str(error.value).startswith(f"[{code}] ")


def test_every_rule_is_broken() -> None:
    codes = set(re.findall(r"^``([\w-]+)``", verifier.__doc__ or "", re.MULTILINE))
    assert len(codes) == 9
    assert {code for code, _, _ in FAULTS} == codes


@pytest.mark.parametrize("name", MODELS)
def test_what_the_frontend_makes_keeps_the_rules(name: str) -> None:
    verify(support.lowered(name))
    verify(support.canonical(name))
