"""Every rule of the verifier is broken once, and told by its code."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import traceback
from collections.abc import Callable

import onnx_ir as ir
import pytest

from qeff_ir.errors import VerificationError
from qeff_ir.ir import verifier
from qeff_ir.ir.module import Dim, Module, Specialization
from qeff_ir.ir.printer import excerpt
from qeff_ir.ir.residents import Resident
from qeff_ir.ir.verifier import verify
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


@fault("order", "Add 'early' of model.layers.0.input_layernorm reads 'mean' before it is defined")
def node_before_its_input(module: Module) -> None:
    node = first(module, "Add")
    node.outputs[0].name = "early"
    module.graph.remove(node)
    module.graph.insert_before(module.graph[0], node)


@fault("order", "MatMul 'linear' of model.layers.0.self_attn.q_proj reads 'gone' before it is defined")
def dangling_value(module: Module) -> None:
    first(module, "MatMul").replace_input_with(0, ir.val("gone"))


@fault("order", "the output 'lost' of the function CachePositions is made by no node")
def function_output_of_nothing(module: Module) -> None:
    function = next(f for f in module.model.functions.values() if f.name == "CachePositions")
    function.outputs[0] = ir.val("lost")


@fault("order", "the output 'lost' of a graph in If 'chosen' is made by no node")
def inner_output_of_nothing(module: Module) -> None:
    inner = [ir.Graph([], [ir.val("lost")], nodes=[]) for _ in range(2)]
    attributes = [ir.AttrGraph(name, graph) for name, graph in zip(("then_branch", "else_branch"), inner, strict=True)]
    node = ir.node("If", [module.graph.inputs[0]], attributes={a.name: a for a in attributes})
    node.outputs[0].name = "chosen"
    module.graph.insert_before(module.graph[0], node)


@fault("order", "Identity 'outer' reads 'inner' before it is defined")
def inner_value_read_outside(module: Module) -> None:
    """What a branch makes is its own; only what was there before can be read in it."""
    branches: list[ir.Attr] = []
    for name in ("then_branch", "else_branch"):
        made = ir.node("Identity", [module.graph.inputs[0]])
        made.outputs[0].name = "inner" if name == "then_branch" else "other"
        branches.append(ir.AttrGraph(name, ir.Graph([], made.outputs, nodes=[made])))
    node = ir.node("If", [module.graph.inputs[0]], attributes={a.name: a for a in branches})
    node.outputs[0].name = "chosen"
    module.graph.insert_before(module.graph[0], node)
    reader = ir.node("Identity", [branches[0].as_graph().outputs[0]])
    reader.outputs[0].name = "outer"
    module.graph.insert_after(node, reader)


@fault("order", "graph output 'logits' is made by no node")
def output_of_nothing(module: Module) -> None:
    old = module.output("logits")
    old.name = "old"
    module.graph.outputs[0] = ir.val("logits", shape=old.shape, dtype=old.dtype)


@fault(
    "names", "two values are named 'mul_39', the second is a result of Mul 'mul_39' of model.layers.0.input_layernorm"
)
def two_values_of_one_name(module: Module) -> None:
    nodes = [n for n in module.graph if n.op_type == "Mul"]
    nodes[1].outputs[0].name = nodes[0].outputs[0].name


@fault("names", "two values are named 'input_ids', the second is a result of Mul 'input_ids' of model.rotary_emb")
def node_named_like_an_input(module: Module) -> None:
    first(module, "Mul").outputs[0].name = "input_ids"


@fault("initializer", "initializer 'lm_head.weight' has no tensor")
def weight_without_numbers(module: Module) -> None:
    module.graph.initializers["lm_head.weight"].const_value = None


@fault("initializer", "initializer 'lm_head.weight' is declared [32,97], its tensor is [97,32]")
def weight_of_another_shape(module: Module) -> None:
    module.graph.initializers["lm_head.weight"].shape = ir.Shape([32, 97])


@fault("initializer", "initializer 'lm_head.weight' is declared FLOAT16, its tensor is FLOAT")
def weight_of_another_type(module: Module) -> None:
    module.graph.initializers["lm_head.weight"].dtype = ir.DataType.FLOAT16


@fault("names", "two values are named 'lm_head.weight', the second is an initializer")
def initializer_named_like_an_input(module: Module) -> None:
    module.input("position_ids").name = "lm_head.weight"


@fault("operator", "Mull 'mul_39' of model.rotary_emb does not exist in opset 24")
def unknown_operator(module: Module) -> None:
    first(module, "Mul").op_type = "Mull"


@fault("operator", "Attention 'attention' of model.layers.0.self_attn does not exist in opset 18")
def operator_of_a_later_opset(module: Module) -> None:
    module.model.opset_imports[""] = 18


@fault("operator", "Mul 'mul_39' of model.rotary_emb is of domain 'elsewhere', which is not imported")
def domain_without_import(module: Module) -> None:
    first(module, "Mul").domain = "elsewhere"


@fault("operator", "CachePositions 'cache_positions' of model has no body in the model")
def dialect_without_body(module: Module) -> None:
    module.model.functions.clear()


@fault("interface", "graph input 'position_ids' has no type or no shape")
def input_without_shape(module: Module) -> None:
    module.input("position_ids").shape = None


@fault("interface", "graph input 'position_ids' has the dim 'tokens', which the module does not declare")
def undeclared_dim(module: Module) -> None:
    module.input("position_ids").shape = ir.Shape(["batch_size", "tokens"])


@fault("interface", "graph output 'logits' has the dim 'None', which the module does not declare")
def anonymous_dim(module: Module) -> None:
    module.output("logits").shape = ir.Shape([None, "seq_len", 97])


@fault("state-pair", "the value state of layer 1 has no output 'past_value.1_RetainedState'")
def state_without_output(module: Module) -> None:
    module.output("past_value.1_RetainedState").name = "value_1"


@fault("state-pair", "the key state of layer 0 has no input 'past_key.0'")
def state_without_input(module: Module) -> None:
    module.input("past_key.0").name = "key_0"


@fault(
    "state-pair",
    "graph input 'past_key.0' is FLOAT ['batch_size', 2, 'ctx_len', 8], its state says FLOAT16 "
    "['batch_size', 2, 'ctx_len', 8]",
)
def state_of_another_type(module: Module) -> None:
    module.residents[0] = dataclasses.replace(module.residents[0], dtype=ir.DataType.FLOAT16)


@fault(
    "state-pair",
    "graph input 'past_key.0' is FLOAT ['batch_size', 2, 'ctx_len', 8], its state says FLOAT "
    "['batch_size', 4, 'ctx_len', 8]",
)
def state_of_another_shape(module: Module) -> None:
    module.residents[0] = dataclasses.replace(module.residents[0], shape=("batch_size", 4, "ctx_len", 8))


@fault("state-pair", "graph output 'past_value.1_RetainedState' is named like a state, but the module declares none")
def undeclared_state(module: Module) -> None:
    module.residents.pop()


def swap(one: ir.Value, other: ir.Value) -> None:
    names = one.name, other.name
    one.name = other.name = None
    other.name, one.name = names


@fault("state-flow", "the state output 'past_key.0_RetainedState' is not made of its input 'past_key.0'")
def outputs_of_one_layer_swapped(module: Module) -> None:
    swap(module.output("past_key.0_RetainedState"), module.output("past_value.0_RetainedState"))


@fault("state-flow", "the state output 'past_key.1_RetainedState' is not made of its input 'past_key.1'")
def inputs_of_one_layer_swapped(module: Module) -> None:
    swap(module.input("past_key.1"), module.input("past_value.1"))


@fault("state-flow", "the state output 'past_key.1_RetainedState' is not made of its input 'past_key.1'")
def layers_swapped(module: Module) -> None:
    swap(module.output("past_key.0_RetainedState"), module.output("past_key.1_RetainedState"))


@fault("state-pair", "the lora-a state of layer model.q has no input 'model.q.lora_a_weights'")
def adapter_without_input(module: Module) -> None:
    module.residents.append(Resident(0, "lora-a", (5, 64, 8), ir.DataType.FLOAT, path="model.q", retained=False))


@fault(
    "state-kinds",
    "the states are not ordered by layer, key before value, each once: ['past_value.0', 'past_key.0', 'past_key.1', "
    "'past_value.1']",
)
def values_before_keys(module: Module) -> None:
    module.residents[0], module.residents[1] = module.residents[1], module.residents[0]


@fault(
    "state-kinds",
    "the states are not ordered by layer, key before value, each once: ['past_key.0', 'past_value.0', 'past_key.1', "
    "'past_value.1', 'past_value.1']",
)
def state_declared_twice(module: Module) -> None:
    module.residents.append(module.residents[-1])


@fault("dims", "specialization Decode gives no size to 'seq_len'")
def specialization_without_a_dim(module: Module) -> None:
    module.specializations = [Specialization("Decode", "decode", {"batch_size": 1, "ctx_len": 8})]


@fault("dims", "specialization Decode gives no size to 'batch_size'")
def specialization_of_size_zero(module: Module) -> None:
    module.specializations = [Specialization("Decode", "decode", {"batch_size": 0, "ctx_len": 8, "seq_len": 1})]


@fault("dims", "two specializations have the same name: Prefill, Prefill")
def two_specializations_of_one_name(module: Module) -> None:
    module.specializations = [module.specializations[0]] * 2


@fault("bounds", "specialization Prefill asks for ctx_len=48, the model takes at most 32")
def context_beyond_the_model(module: Module) -> None:
    module.dims["ctx_len"] = Dim("ctx_len", 32)


@pytest.mark.parametrize(("code", "message", "plant"), [pytest.param(*f, id=f[2].__name__) for f in FAULTS])
def test_a_broken_rule_is_told_by_its_code(code: str, message: str, plant: Callable[[Module], None]) -> None:
    module = support.canonical("llama")
    verify(module)
    plant(module)
    with pytest.raises(VerificationError) as error:
        verify(module)
    said = error.value
    assert (said.code, said.message) == (code, message)
    assert str(said) == f"[{code}] {message}\n{said.lines}\n  hint: {said.hint}"
    marked, caret = next(pair for pair in itertools.pairwise(said.lines.splitlines()) if pair[0].startswith("  >"))
    assert re.fullmatch(r" +\| *\^+", caret)
    assert marked[caret.index("^") : len(caret)].strip()  # the caret points at something


def test_a_rule_shows_the_lines_around_the_fault_and_what_to_do() -> None:
    module = support.canonical("llama")
    first(module, "Cos").replace_input_with(0, ir.val("gone"))
    with pytest.raises(VerificationError) as error:
        verify(module)
    assert (
        str(error.value)
        == """\
[order] Cos 'cos' of model.rotary_emb reads 'gone' before it is defined
      61 | %mul_39: float[batch_size, seq_len, 4] = Mul(%_to_copy, %model.rotary_emb.inv_freq)  ; model.rotary_emb
      62 | %cat: float[batch_size, seq_len, 8] = Concat(%mul_39, %mul_39) {axis=-1}  ; model.rotary_emb
  >   63 | %cos: float[batch_size, seq_len, 8] = Cos(%gone)  ; model.rotary_emb
         |                                           ^^^^^
      64 | %sin: float[batch_size, seq_len, 8] = Sin(%cat)  ; model.rotary_emb
      65 | %pow_1: float[batch_size, seq_len, 32] = Pow(%embedding, %val_57)  ; model.layers.0.input_layernorm
  hint: nothing in the graph makes it: insert its node, or keep the one that was removed"""
    )


@pytest.mark.parametrize(
    ("plant", "hint"),
    [
        (node_before_its_input, "move ReduceMean 'mean' of model.layers.0.input_layernorm before it: rewriter.at(node) "
         "inserts before that node"),
        (unknown_operator, "did you mean 'Mul'?"),
        (operator_of_a_later_opset, "it came with opset 23: raise the opset, or write it with older operators"),
        (dialect_without_body, "call qeff_ir.ir.operators.attach(module.model) at the end of the pass"),
        (undeclared_dim, "use one of batch_size, seq_len, ctx_len, or add it to module.dims"),
        (context_beyond_the_model, "ask for 32 or less"),
    ],
)  # fmt: skip
def test_hints_fit_the_fault(plant: Callable[[Module], None], hint: str) -> None:
    module = support.canonical("llama")
    plant(module)
    with pytest.raises(VerificationError) as error:
        verify(module)
    assert error.value.hint == hint


def test_a_place_far_to_the_right_is_kept_in_view() -> None:
    module = support.canonical("llama")
    node = first(module, "Attention")
    node.replace_input_with(3, ir.val("gone"))
    lines = excerpt(module, node, "%gone").splitlines()
    assert lines[3][lines[3].index("^") :] == "^^^^^"
    assert lines[2][lines[3].index("^") :].startswith("%gone")
    assert max(map(len, lines)) <= 123
    assert excerpt(module, "in nothing") == ""


def test_every_rule_is_broken() -> None:
    codes = set(re.findall(r"^``([\w-]+)``", verifier.__doc__ or "", re.MULTILINE))
    raised = set(re.findall(r'broken\(module, "([\w-]+)"', inspect.getsource(verifier)))
    assert {code for code, _, _ in FAULTS} == codes == raised


def test_every_way_to_break_a_rule_is_broken() -> None:
    """A rule may raise at several places: each is reached by a fault."""
    reached: set[int] = set()
    for _, _, plant in FAULTS:
        module = support.canonical("llama")
        plant(module)
        with pytest.raises(VerificationError) as error:
            verify(module)
        frames = traceback.extract_tb(error.value.__traceback__)
        reached.add(next(f.lineno for f in reversed(frames) if f.filename == verifier.__file__ and f.lineno) or 0)
    lines = inspect.getsource(verifier).splitlines()
    assert reached == {number for number, line in enumerate(lines, 1) if line.strip().startswith("raise broken(")}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_frontend_makes_keeps_the_rules(name: str) -> None:
    verify(support.lowered(name))
    verify(support.canonical(name))
