"""The pass manager: all or nothing for each pass, promises checked, the order checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest

from qeff_ir.errors import PassError, PipelineError
from qeff_ir.ir.module import PASS_KEY, SOURCE_KEY, Dim, Module, all_values
from qeff_ir.ir.printer import to_text
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.expect import AllSites
from qeff_ir.passing.instrument import Instrument
from qeff_ir.passing.manager import PassRun, run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.properties import problem
from tests import support


@pytest.fixture
def module() -> Module:
    return support.lowered("llama")


def make(run: Callable[[Module, Rewriter], None], **promises: object) -> Pass:
    """A pass, not registered, that does `run`."""

    @dataclass(frozen=True, slots=True)
    class Made(Pass):
        name: ClassVar[str] = "made"

        def run(self, module: Module, rewriter: Rewriter) -> None:
            run(module, rewriter)

    for name, value in promises.items():
        setattr(Made, name, value)
    return Made()


def first(module: Module, op_type: str) -> ir.Node:
    return next(n for n in module.graph if n.op_type == op_type)


def wreck(module: Module, rewriter: Rewriter) -> None:
    """Change everything that a module consists of."""
    node = first(module, "Add")
    rewriter.replace(node, rewriter.at(node)("Sub", *node.inputs))
    first(module, "Mul").outputs[0].name = "renamed"
    module.graph.initializers["lm_head.weight"].const_value = None
    module.input("input_ids").shape = ir.Shape([1, 2])
    module.residents.pop()
    module.dims["more"] = Dim("more")
    module.properties.add("canonical")
    module.model.opset_imports["other"] = 1
    module.model.functions.clear()


@pytest.mark.parametrize(
    "error", [PassError("no"), ValueError("no"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_a_pass_that_fails_changes_nothing(module: Module, error: BaseException) -> None:
    def fail(module: Module, rewriter: Rewriter) -> None:
        wreck(module, rewriter)
        assert to_text(module) != before
        raise error

    before, functions = to_text(module), set(module.model.functions)
    with pytest.raises(type(error)) as raised:
        run_pipeline(module, Pipeline((make(fail),)))
    assert to_text(module) == before
    assert set(module.model.functions) == functions
    assert module.graph.initializers["lm_head.weight"].const_value is not None
    if isinstance(error, PassError):
        assert str(raised.value) == "pass made: no"
    else:
        assert raised.value is error


def attack(module: Module, rewriter: Rewriter) -> None:
    """Change in place what a copy could share."""
    for value in all_values(module.graph):
        if value.dtype is not None:
            value.dtype = ir.DataType.BFLOAT16
        if value.shape is not None and len(value.shape):
            value.shape[0] = 7
        value.metadata_props["spoilt"] = "yes"
        value.doc_string = "spoilt"
    for node in module.graph:
        node.metadata_props.clear()
        node.attributes.clear()
        node.name = node.op_type = "Spoilt"
    for function in module.model.functions.values():
        function.opset_imports[""] = 1
        for node in function:
            node.outputs[0].dtype = ir.DataType.BFLOAT16
            node.attributes.clear()
    module.specializations[0].symbols["batch_size"] = 77  # pyright: ignore[reportIndexIssue]
    module.model.metadata_props["spoilt"] = module.graph.metadata_props["spoilt"] = "yes"
    module.graph.name = module.name = "spoilt"
    raise PassError("no")


def test_what_a_failing_pass_did_in_place_is_undone_to_the_byte() -> None:
    module = support.canonical("llama")
    module.write_facts()
    before = ir.to_proto(module.model).SerializeToString(deterministic=True)
    facts = module.facts()
    with pytest.raises(PassError):
        run_pipeline(module, Pipeline((make(attack),)))
    assert ir.to_proto(module.model).SerializeToString(deterministic=True) == before
    assert module.facts() == facts


@pytest.mark.parametrize("name", ["lm_head.weight", "const.int64.4.3366c82d"])
def test_the_numbers_of_tensors_cannot_be_changed_in_place(name: str) -> None:
    """Neither those of weights, which are the user's model, nor those of constants; other tensors take their place."""

    def scribble(module: Module, rewriter: Rewriter) -> None:
        tensor = module.graph.initializers[name].const_value
        assert tensor is not None
        tensor.numpy()[...] = 0

    module = support.canonical("llama")
    before = to_text(module)
    with pytest.raises(ValueError, match="read-only"):
        run_pipeline(module, Pipeline((make(scribble),)))
    assert to_text(module) == before


def test_a_site_finder_that_raises_is_a_failure_of_its_pass(module: Module) -> None:
    def sites(self: Pass, module: Module) -> list[ir.Node]:
        module.residents.clear()
        raise PassError("no site")

    told: list[str] = []

    class Told(Instrument):
        def failed(self, id: str, item: Pass, module_before: Module, error: BaseException) -> None:
            told.append(f"{id} {len(module_before.states)}")

    before = to_text(module)
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline((make(lambda module, rewriter: None, sites=sites),)), instruments=[Told()])
    assert (str(error.value), told) == ("pass made: no site", ["made 4"])
    assert to_text(module) == before


def test_nodes_made_past_the_rewriter_are_stamped(module: Module) -> None:
    def bypass(module: Module, rewriter: Rewriter) -> None:
        node = first(module, "Sigmoid")
        new = ir.node("Tanh", node.inputs, metadata_props={PASS_KEY: "an earlier pass"})
        module.graph.insert_before(node, new)
        node.outputs[0].replace_all_uses_with(new.outputs[0])

    run_pipeline(module, Pipeline((make(bypass),)))
    (new,) = [n for n in module.graph if n.op_type == "Tanh"]
    assert (new.metadata_props[PASS_KEY], new.metadata_props[SOURCE_KEY]) == ("made", "model.layers.0.mlp.gate_proj")


def test_the_passes_before_a_failure_stay(module: Module) -> None:
    def fail(module: Module, rewriter: Rewriter) -> None:
        raise PassError("no")

    (canonicalize,) = Pipeline.parse("canonicalize").passes
    expected = support.lowered("llama")
    run_pipeline(expected, Pipeline((canonicalize,)))
    with pytest.raises(PassError):
        run_pipeline(module, Pipeline((canonicalize, make(fail))))
    assert to_text(module) == to_text(expected)


def test_a_pass_that_breaks_a_rule_of_the_ir_is_undone(module: Module) -> None:
    def dangle(module: Module, rewriter: Rewriter) -> None:
        first(module, "Add").replace_input_with(0, ir.val("nowhere"))

    before = to_text(module)
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline((make(dangle),)))
    assert str(error.value).splitlines()[0] == (
        "pass made: [order] Add 'add_94' of model.layers.0.input_layernorm reads 'nowhere' before it is defined"
    )
    assert to_text(module) == before


def rename_input(module: Module, rewriter: Rewriter) -> None:
    module.input("position_ids").name = "positions"


def test_an_undeclared_change_of_the_interface_is_refused(module: Module) -> None:
    before = to_text(module)
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline((make(rename_input),)))
    assert str(error.value) == (
        "pass made: [contract] the pass changed the interface: 'in  %position_ids: int64[batch_size, seq_len]' is "
        "gone; 'in  %positions: int64[batch_size, seq_len]' is new\n"
        "  hint: set changes_interface = True on the pass if it is meant to"
    )
    assert to_text(module) == before


def test_a_declared_change_of_the_interface_is_taken(module: Module) -> None:
    run_pipeline(module, Pipeline((make(rename_input, changes_interface=True),)))
    assert module.input("positions") in module.graph.inputs


def test_the_order_of_inputs_is_part_of_the_interface(module: Module) -> None:
    def swap(module: Module, rewriter: Rewriter) -> None:
        one, two = module.graph.inputs[0], module.graph.inputs[1]
        module.graph.inputs[0], module.graph.inputs[1] = ir.val("spare"), ir.val("spare2")
        module.graph.inputs[0], module.graph.inputs[1] = two, one

    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline((make(swap),)))
    assert str(error.value) == (
        "pass made: [contract] the pass changed the interface: its order is another\n"
        "  hint: set changes_interface = True on the pass if it is meant to"
    )


def test_requirements_are_checked_before_anything_runs(module: Module) -> None:
    before = to_text(module)
    with pytest.raises(PipelineError) as error:
        run_pipeline(module, Pipeline.parse("canonicalize,legalize"))
    assert str(error.value) == (
        "legalize requires the property 'attention-lowered', but no pass before establishes it; "
        "put attention before legalize"
    )
    assert to_text(module) == before


def test_a_property_that_was_destroyed_is_missing(module: Module) -> None:
    spoil = make(lambda module, rewriter: None, invalidates=frozenset({"canonical"}))
    (canonicalize, unflatten) = Pipeline.parse("canonicalize,unflatten").passes
    with pytest.raises(PipelineError) as error:
        run_pipeline(module, Pipeline((canonicalize, spoil, unflatten)))
    assert str(error.value) == (
        "unflatten requires the property 'canonical', but made destroys it before; put canonicalize before unflatten"
    )
    run_pipeline(module, Pipeline((canonicalize, spoil, canonicalize, unflatten)))
    assert "canonical" in module.properties


def test_properties_are_kept(module: Module) -> None:
    lasting = make(lambda module, rewriter: None, establishes=frozenset({"x"}))
    run_pipeline(module, Pipeline((lasting,)))
    run_pipeline(module, Pipeline((make(lambda module, rewriter: None, requires=frozenset({"x"})),)))
    run_pipeline(module, Pipeline((make(lambda module, rewriter: None, invalidates=frozenset({"x"})),)))
    with pytest.raises(PipelineError) as error:
        run_pipeline(module, Pipeline((make(lambda module, rewriter: None, requires=frozenset({"x"})),)))
    assert str(error.value) == "made requires the property 'x', but no pass before establishes it"


def miss_two(module: Module, rewriter: Rewriter) -> None:
    for node in [n for n in module.graph if n.op_type == "CacheUpdate"][:2]:
        rewriter.missed(node, "it is odd")


def test_a_missed_site_is_reported(module: Module) -> None:
    report = run_pipeline(module, Pipeline((make(miss_two),)))
    assert report.to_json()["passes"][0]["missed"] == [
        {"source": "model.layers.0.self_attn", "reason": "it is odd"},
        {"source": "model.layers.0.self_attn", "reason": "it is odd"},
    ]


def test_a_missed_site_fails_a_pass_that_promises_all(module: Module) -> None:
    with pytest.raises(PassError) as error:
        run_pipeline(module, Pipeline((make(miss_two, expect=AllSites()),)))
    assert str(error.value) == (
        "pass made: 2 of 2 sites were not rewritten:\n"
        "  model.layers.0.self_attn: CacheUpdate 'past_key.0_RetainedState' [refused] it is odd\n"
        "  model.layers.0.self_attn: CacheUpdate 'past_value.0_RetainedState' [refused] it is odd"
    )


def test_modified_is_computed_and_not_claimed(module: Module) -> None:
    def retype(module: Module, rewriter: Rewriter) -> None:
        node = first(module, "Add")
        rewriter.replace(node, rewriter.at(node)("Sub", *node.inputs))

    def claim(module: Module, rewriter: Rewriter) -> None:
        rewriter.stats.fired["nothing at all"] += 1

    report = run_pipeline(module, Pipeline((make(retype), make(claim))))
    assert [r.modified for r in report.runs] == [True, False]
    assert [r.id for r in report.runs] == ["made", "made#2"]


def test_watchers_are_told_before_and_after(module: Module) -> None:
    told: list[tuple[str, bool]] = []

    def watch(name: str, run: PassRun | None) -> None:
        told.append((name, run is not None))

    run_pipeline(module, Pipeline.parse("canonicalize,unflatten"), watch)
    assert told == [("canonicalize", False), ("canonicalize", True), ("unflatten", False), ("unflatten", True)]


def test_new_nodes_carry_their_source_and_their_pass() -> None:
    module = support.canonical("llama")
    support.apply(module, support.rest_of("onnxruntime"))
    made = [n for n in module.graph if n.op_type in ("GroupQueryAttention", "FusedMatMul", "QuickGelu")]
    assert len(made) == 2 + 9 + 2
    assert all(n.metadata_props[SOURCE_KEY] for n in made)
    assert {n.metadata_props["qeff.pass"] for n in made} == {"ort-attention", "ort-kernels"}
    kernels = [n.metadata_props[SOURCE_KEY] for n in made if n.op_type == "GroupQueryAttention"]
    assert kernels == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "bloom"])
def test_a_second_run_of_the_structural_passes_changes_nothing(name: str) -> None:
    module = support.lowered(name)
    fusions = "unflatten,fuse-norms,fuse-rotary,fuse-activations"
    support.apply(module, "canonicalize")
    for steps in ("canonicalize", fusions, fusions):
        report = support.apply(module, steps)
    assert [r.id for r in report.runs if r.modified] == []
    support.apply(module, "canonicalize")  # infers the shapes of what the fusions made
    (again,) = support.apply(module, "canonicalize").runs
    assert not again.modified


def test_a_layout_is_a_property_that_can_be_required() -> None:
    module = support.canonical("llama")
    needs = make(lambda module, rewriter: None, requires=frozenset({"scatter-layout"}))
    before = Pipeline.parse("kv-retention{layout=tensor-scatter}")
    with pytest.raises(PipelineError) as error:
        run_pipeline(module, Pipeline((*before.passes, needs)))
    assert str(error.value) == (
        "made requires the property 'scatter-layout', but no pass before establishes it; "
        "put kv-retention{layout=scatter} before made"
    )
    run_pipeline(module, Pipeline((*Pipeline.parse("kv-retention{layout=scatter}").passes, needs)))
    assert "scatter-layout" in module.properties and "tensor-scatter-layout" not in module.properties
    with pytest.raises(PassError, match="the caches have the layout scatter already: lower the model again"):
        run_pipeline(module, before)
    assert problem("scatter-layout", module) is None
    assert str(problem("tensor-scatter-layout", module)).endswith("writes a cache")
