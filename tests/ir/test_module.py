"""Facts travel with the model; renaming a dim reaches everything."""

from __future__ import annotations

import json

import pytest

from backends.options import CompileOptions
from qeff_ir.errors import PassError, VerificationError
from qeff_ir.ir.module import FORMAT_VERSION, METADATA_KEY, Dim, Module
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.verifier import verify
from qeff_ir.specialize import specialize
from tests import support


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek-v3"])
def test_facts_go_through_the_metadata_and_back(name: str) -> None:
    module = support.canonical(name)
    support.apply(module, support.rest_of("onnxruntime"))
    back = Module.with_facts(module.model.clone())
    for part in ("name", "states", "dims", "specializations", "properties"):
        assert getattr(back, part) == getattr(module, part)
    assert any(s.ring for s in back.states) == (name == "gemma2")
    assert to_text(back) == to_text(module)


def test_a_foreign_model_is_refused() -> None:
    module = support.lowered("llama")
    del module.model.metadata_props[METADATA_KEY]
    with pytest.raises(VerificationError, match=r"\[facts\] .* was not saved by qeff-ir"):
        Module.with_facts(module.model)


@pytest.mark.parametrize("version", [1, FORMAT_VERSION - 1, FORMAT_VERSION + 1, 99])
def test_another_version_is_refused(version: int) -> None:
    module = support.lowered("llama")
    module.model.metadata_props[METADATA_KEY] = json.dumps({**module.facts(), "version": version})
    with pytest.raises(VerificationError, match=f"version {version}, this qeff-ir reads {FORMAT_VERSION}: lower"):
        Module.with_facts(module.model)


def test_renaming_a_dim_reaches_everything() -> None:
    module = support.canonical("bloom")
    assert "4*batch_size" in to_text(module)
    module.rename_dim("batch_size", "rows")
    verify(module)
    assert "batch_size" not in to_text(module)
    assert "4*rows" in to_text(module)


def test_a_symbol_gets_its_sizes_in_each_phase() -> None:
    module = support.canonical("llama")
    module.dims |= {name: Dim(name) for name in ("rows", "keys")}
    module.set_size("rows", 3)
    module.set_size("keys", lambda s: s.symbols["seq_len"] + s.symbols["rows"])
    assert [(s.name, s.symbols["keys"]) for s in module.specializations] == [("Prefill", 11), ("Decode", 4)]
    module.split("keys", {"prefill": [16, 48], "decode": [32], "forward": [5]})
    module.split("seq_len", {"prefill": [8], "decode": [3, 1]})
    found = [(s.name, s.phase, s.symbols["keys"], s.symbols["seq_len"]) for s in module.specializations]
    assert found == [
        ("Prefill_16", "prefill", 16, 8),
        ("Prefill_48", "prefill", 48, 8),
        ("Decode_3", "decode", 32, 3),
        ("Decode_1", "decode", 32, 1),
    ]
    assert {s.symbols["rows"] for s in module.specializations} == {3}
    assert module.clone().specializations == module.specializations


@pytest.mark.parametrize("sizes", [[], [8, 8], [8, 0]])
def test_sizes_that_no_symbol_can_be_split_by(sizes: list[int]) -> None:
    module = support.canonical("llama")
    module.dims["keys"] = Dim("keys")
    before = list(module.specializations)
    with pytest.raises(PassError, match=r"'keys' is given the sizes \[.*\] in the phase 'decode': give one or several"):
        module.split("keys", {"prefill": [8], "decode": sizes})
    assert module.specializations == before


def test_a_symbol_that_the_module_does_not_have_gets_no_size() -> None:
    module = support.canonical("llama")
    before = list(module.specializations)
    message = "has no symbol 'ctx_length' that could have a size: it has batch_size, seq_len, ctx_len; add it to dims"
    with pytest.raises(PassError, match=message):
        module.set_size("ctx_length", 8)
    with pytest.raises(PassError, match=message):
        module.split("ctx_length", {"prefill": [8], "decode": [8]})
    assert module.specializations == before


@pytest.mark.parametrize(("chunk", "phases"), [(8, ["prefill", "decode"]), (1, ["decode"])])
def test_phases_of_a_decoder(chunk: int, phases: list[str]) -> None:
    module = support.canonical("llama")
    specialize(module, CompileOptions(prefill_seq_len=chunk, ctx_len=16))
    assert [s.phase for s in module.specializations] == phases


def test_names_that_are_not_there_are_errors() -> None:
    module = support.lowered("llama")
    with pytest.raises(VerificationError, match=r"\[interface\] the graph of LlamaForCausalLM has no input named 'x'"):
        module.input("x")
    with pytest.raises(VerificationError, match="has no output named 'x'"):
        module.output("x")


def test_state_names_are_those_of_the_contract() -> None:
    state = support.lowered("llama").states[3]
    assert (state.layer, state.kind) == (1, "value")
    assert (state.input, state.output) == ("past_value.1", "past_value.1_RetainedState")
    assert state.ctx_dim == "ctx_len"
