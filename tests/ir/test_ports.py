"""Roles of inputs and outputs: they go where the value goes, and tell what a run gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from backends import find_backend
from qeff_ir.arrays import Array
from qeff_ir.debug.drive import drive, make_plan
from qeff_ir.errors import PackageError, PipelineError, RuntimeInputError, VerificationError
from qeff_ir.ir import ports
from qeff_ir.ir.module import Module, Specialization
from qeff_ir.ir.ports import (
    CACHE_ROW,
    EMBEDDINGS,
    FEATURES,
    KEPT_LOGITS,
    LOGITS,
    MASK,
    POSITIONS,
    READ_LENGTH,
    TOKENS,
    Port,
    Run,
)
from qeff_ir.ir.printer import fingerprint, to_text
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.passing import Pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.encoder import Encoder
from qeff_ir.runtime.interface import interface_of
from qeff_ir.runtime.runs import fitted, last
from tests import support
from tests.debug.models import plain

RUN = Run(np.array([[5, 6], [7, 0]]), np.array([[0, 1], [0, -1]]))


def roles(module: Module) -> list[tuple[str | None, str]]:
    values = (*module.graph.inputs, *module.graph.outputs)
    return [(v.name, role.name) for v in values if (role := module.role_of(v)) is not None]


def test_roles_are_kept_by_copies_and_by_files(tmp_path: Path) -> None:
    module = support.lowered("llama")
    known = [("input_ids", "tokens"), ("position_ids", "positions"), ("logits", "logits")]
    assert roles(module) == known
    copy = module.clone()
    assert roles(copy) == known
    module.declare(module.input("past_key.0"), CACHE_ROW)  # whatever the names tell
    assert CACHE_ROW.name not in copy.ports.values()
    assert roles(load_module(save_module(module, tmp_path))) == roles(module) != known


def test_a_role_is_asked_for_whatever_the_value_is_called() -> None:
    module = support.lowered("llama")
    value = module.port(POSITIONS)
    value.name = "pos"
    assert module.find(POSITIONS) is None
    with pytest.raises(VerificationError, match=r"LlamaForCausalLM has no port with the role 'positions'$"):
        module.port(POSITIONS)
    module.declare(value, POSITIONS)
    assert module.port(POSITIONS) is value
    assert module.port(LOGITS) is module.output("logits") and module.find(MASK) is None


def given(role: ports.Role, run: Run) -> list[list[int]]:
    array = role.feed(run) if role.feed is not None else None
    assert array is not None
    return array.tolist()


def test_a_run_tells_what_each_role_is_given() -> None:
    assert TOKENS.feed is not None and POSITIONS.feed is not None
    assert TOKENS.feed(RUN) is RUN.tokens and POSITIONS.feed(RUN) is RUN.positions
    assert given(ports.ADAPTER_ROW, RUN) == [[0], [0]] and given(CACHE_ROW, RUN) == [[0], [1]]
    other = Run(RUN.tokens, RUN.positions, adapters=np.array([2, 1]), cache_rows=np.array([4, 3]))
    assert given(ports.ADAPTER_ROW, other) == [[2], [1]] and given(CACHE_ROW, other) == [[4], [3]]
    assert EMBEDDINGS.feed is not None
    with pytest.raises(RuntimeInputError, match="the graph takes vectors in place of tokens: give the table of the"):
        EMBEDDINGS.feed(RUN)


def test_two_roles_of_one_name_are_refused() -> None:
    with pytest.raises(PipelineError, match="two roles have the name 'tokens'; rename one"):
        ports.define(ports.Role("tokens", "again"))


def test_an_interface_has_what_callers_give_and_not_what_stays() -> None:
    module = support.canonical("llama")
    support.apply(module, 'lora{mode=slots n=2 rank=2 targets="q_proj" retained=true}')
    found = interface_of(module, Path("model.onnx"))
    assert [port.name for port in found.inputs] == ["input_ids", "position_ids", "lora_ids"]
    assert [port.name for port in found.outputs] == ["logits"]
    assert list(found.residents) == module.residents and module.states and module.adapters
    tokens = found.input(TOKENS)
    assert tokens is not None and tokens.shape == ("batch_size", "seq_len") and tokens.dtype == np.int64
    assert found.input(MASK) is None and found.output(TOKENS) is None


def test_an_input_of_a_plug_in_is_given_what_its_role_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that adds an input declares it, and no session or runner is touched for it."""
    bias = ports.Role("bias", "added to the logits, float32 [batch, 1, 1]", _sums)
    monkeypatch.setitem(ports.ROLES, bias.name, bias)

    def add(module: Module) -> None:
        value = module.declare(ir.val("bias", shape=ir.Shape(["batch_size", 1, 1]), dtype=ir.DataType.FLOAT), bias)
        module.graph.inputs.insert(2, value)
        out = module.port(LOGITS)
        node = out.producer()
        assert node is not None
        plus = ir.node("Add", [out, value])
        module.graph.insert_after(node, plus)
        total = plus.outputs[0]
        total.shape, total.type, total.name, out.name = out.shape, out.type, "logits", "plain_logits"
        module.graph.outputs[0] = total

    plain, more = support.canonical("llama"), support.canonical("llama")
    expected = support.open_decoder(plain, tmp_path / "plain").prefill(support.PROMPTS)
    support.apply(more, support.rest_of("onnxruntime"))
    add(more)
    backend = find_backend("onnxruntime")
    backend.emit(more, tmp_path / "more", support.OPTIONS)
    found = Decoder(backend.open(tmp_path / "more", threads=1)).prefill(support.PROMPTS)
    np.testing.assert_allclose(found - expected, [[7.0] * 97, [5.0] * 97], atol=1e-4)


def _sums(run: Run) -> Array:
    return np.array([[[7.0]], [[5.0]]], dtype=np.float32) * (run.tokens[:, :1, None] >= 0)


def test_a_session_whose_inputs_nobody_knows_is_no_decoder(tmp_path: Path) -> None:
    module = support.canonical("llama")
    support.apply(module, support.rest_of("onnxruntime"))
    del module.ports["position_ids"]
    backend = find_backend("onnxruntime")
    backend.emit(module, tmp_path, support.OPTIONS)
    session = backend.open(tmp_path, threads=1)
    with pytest.raises(PackageError, match="no role says what to feed to the input position_ids of the package"):
        Decoder(session)


def test_a_session_with_the_logits_of_all_tokens_is_refused(tmp_path: Path) -> None:
    """The first of them would be taken for the last."""
    module, backend = support.canonical("llama"), find_backend("onnxruntime")
    support.apply(module, str(Pipeline.parse(support.rest_of("onnxruntime")).without("last-logits")))
    backend.emit(module, tmp_path, support.OPTIONS)
    with pytest.raises(PackageError, match="returns the logits of all tokens: put last-logits into the pipeline"):
        Decoder(backend.open(tmp_path, threads=1))


def test_a_causal_lm_is_no_forward_pass(tmp_path: Path) -> None:
    module, backend = support.canonical("llama"), find_backend("onnxruntime")
    support.apply(module, support.rest_of("onnxruntime"))
    backend.emit(module, tmp_path, support.OPTIONS)
    with pytest.raises(PackageError, match="that of a causal LM: open it with QEFFAutoModelForCausalLM"):
        Encoder(backend.open(tmp_path, threads=1))


def test_another_role_is_another_module() -> None:
    module = support.lowered("llama")
    before, text = fingerprint(module), to_text(module)
    module.declare(module.port(POSITIONS), MASK)
    assert fingerprint(module) != before
    assert "port position_ids: mask" in to_text(module).splitlines() and "port " not in text


def test_names_tell_no_role_of_what_is_added_later(tmp_path: Path) -> None:
    """A copy, and what is read again, have the roles of the module that they are of, also when it has none."""
    module = plain(tmp_path)
    assert module.ports == {}
    module.graph.inputs[0].name = "input_ids"
    saved = load_module(save_module(module, tmp_path / "saved"))
    assert [m.find(TOKENS) for m in (module, module.clone(), saved)] == [None] * 3


def test_what_cannot_be_declared_is_refused() -> None:
    module = support.lowered("llama")
    with pytest.raises(PipelineError, match=r"a port cannot be declared \(the value has no name\)"):
        module.declare(ir.val(None), MASK)
    with pytest.raises(PipelineError, match=r"a port cannot be declared \(there is no role 'other'\)"):
        module.declare(module.port(POSITIONS), ports.Role("other", "of nobody"))
    with pytest.raises(PipelineError, match="have no name for the role 'other': choose one"):
        ports.name_of(ports.Role("other", "of nobody"))


def test_facts_name_no_port_that_is_gone() -> None:
    module = support.canonical("llama")
    support.apply(module, "token-embedding")
    assert module.find(TOKENS) is None and "input_ids" not in module.facts()["ports"]
    assert module.facts()["ports"]["inputs_embeds"] == "embeddings"


def test_a_part_of_a_graph_that_takes_vectors_is_run_without_their_table() -> None:
    module = support.canonical("llama")
    support.apply(module, "token-embedding")
    module.residents = []
    assert drive(module, make_plan(module)).outputs


def test_an_input_whose_length_counts_is_as_long_as_its_specialization() -> None:
    port = Port("num_logits_to_keep", KEPT_LOGITS, np.dtype(np.int64), ("num_logits_to_keep", 1))
    assert port.is_fed and port.feed(RUN).shape == (1, 1)
    sizes = {"seq_len": 4, "num_logits_to_keep": 3}
    assert port.feed(dataclasses.replace(RUN, sizes=sizes)).tolist() == [[0], [0], [0]]
    assert READ_LENGTH.needs is not None and READ_LENGTH.needs(RUN) == 2
    assert READ_LENGTH.needs(dataclasses.replace(RUN, positions=np.full((2, 2), -1))) == 1


def test_a_run_goes_into_the_smallest_specialization_that_takes_it() -> None:
    port = Port("num_logits_to_keep", KEPT_LOGITS, np.dtype(np.int64), ("num_logits_to_keep", 1))
    known = [
        Specialization(f"{length} {keep}", "decode", {"seq_len": length, "num_logits_to_keep": keep})
        for length, keep in ((8, 1), (8, 4), (4, 4), (4, 3), (2, 1))
    ]

    def taken(columns: int, keep: int) -> Run:
        run = Run(np.full((1, columns), 7), np.arange(columns)[None], keep=keep)
        return fitted(run, [port], known)

    for columns, keep, length, kept in ((2, 1, 2, 1), (2, 2, 4, 3), (4, 4, 4, 4), (5, 1, 8, 1), (1, 1, 2, 1)):
        assert taken(columns, keep).sizes == {"seq_len": length, "num_logits_to_keep": kept}
    assert taken(3, 1).tokens.tolist() == [[7, 7, 7, 0]] and taken(3, 1).positions.tolist() == [[0, 1, 2, -1]]
    with pytest.raises(RuntimeInputError, match="a run of 1 rows and seq_len=9, num_logits_to_keep=1 or"):
        taken(9, 1)
    rows = [dataclasses.replace(s, symbols={**s.symbols, "batch_size": 2}) for s in known]
    with pytest.raises(RuntimeInputError, match="a run of 1 rows and"):
        fitted(Run(np.full((1, 2), 7), np.arange(2)[None]), [port], rows)
    sounds = Port("input_features", FEATURES, np.dtype(np.float32), ("batch_size", 8, "feature_len"))
    with pytest.raises(RuntimeInputError, match=r"input_features has 3 axes, and the run gives \[0\]"):
        fitted(Run(np.full((1, 2), 7), np.arange(2)[None]), [sounds], known)


def test_the_last_logits_are_found_wherever_a_graph_puts_them() -> None:
    """All tokens, the last one, or the last three, of rows with four, two and no tokens."""
    logits = np.random.default_rng(0).normal(size=(3, 4, 5))
    positions = np.array([[0, 1, 2, 3], [6, 7, -1, -1], [-1, -1, -1, -1]])
    run = Run(np.zeros((3, 4), np.int64), positions, keep=2)
    wanted = np.stack([logits[0, 2:4], logits[1, 0:2]])
    np.testing.assert_array_equal(last(logits, run)[:2], wanted)
    kept = np.stack([logits[0, 1:4], logits[1, 0:3], logits[2, 0:3]])
    np.testing.assert_array_equal(last(kept, run)[:2], wanted)
    one = np.stack([logits[0, 3:4], logits[1, 1:2], logits[2, :1]])
    np.testing.assert_array_equal(last(one, dataclasses.replace(run, keep=1))[:2], wanted[:, 1:])


def test_inputs_of_a_run_stand_behind_the_states_in_the_order_of_their_roles() -> None:
    module = support.canonical("llama")
    support.apply(module, 'lora{mode=slots n=2 rank=2 targets="q_proj" retained=true}')
    for role in (KEPT_LOGITS, READ_LENGTH, CACHE_ROW):
        module.add_input(ir.val(ports.name_of(role), shape=ir.Shape(["n"]), dtype=ir.DataType.INT64), role)
    names = [str(value.name) for value in module.graph.inputs]
    at = names.index(module.states[-1].input) + 1
    assert names[at : at + 4] == ["comp_ctx_lengths", "batch_index", "num_logits_to_keep", "lora_ids"]
    assert names[at + 4] == module.adapters[0].input and module.find(KEPT_LOGITS) is not None
