"""What hosts of the AI 100 ask of a package, each spelled out, on both targets, with the answers of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest

from backends import find_backend
from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.arrays import Array
from qeff_ir.compiler import compile_model
from qeff_ir.errors import CompileError, PassError, RuntimeInputError
from qeff_ir.ir.ports import Run
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.runtime.jobs import Job
from qeff_ir.runtime.runs import logits_of
from qeff_ir.runtime.session import Session
from qeff_ir.runtime.speculation import PromptLookup
from tests import support

TARGETS = ["onnxruntime", "ai100"]
SHAPES: dict[str, Any] = {"prefill_seq_len": 8, "ctx_len": 48, "batch_size": 2}


def compiled(name: str, target: str, **options: Any) -> Path:
    made = compile_model(support.Lowered(name), {**SHAPES, **options}, target=target, emit_only=target == "ai100")
    return made.folder


def opened(folder: Path, target: str) -> Session:
    return find_backend(target).open(folder, threads=1)


def named_sizes(folder: Path) -> dict[str, dict[str, str]]:
    found = json.loads((folder / "specializations.json").read_text())["specializations"]
    return {entry["name"]: entry["symbols"] for entry in found}


def shape_of(folder: Path, name: str) -> list[str | int]:
    (file,) = folder.glob("*.onnx")
    graph = onnx.load(str(file), load_external_data=False).graph
    found = next(v for v in (*graph.input, *graph.output) if v.name == name)
    return [d.dim_param or d.dim_value for d in found.type.tensor_type.shape.dim]


def names_of(folder: Path) -> tuple[list[str], list[str]]:
    (file,) = folder.glob("*.onnx")
    graph = onnx.load(str(file), load_external_data=False).graph
    weights = {t.name for t in graph.initializer}
    return [v.name for v in graph.input if v.name not in weights], [v.name for v in graph.output]


def states(session: Session) -> dict[str, Array]:
    """The buffers of a session's states, by input."""
    held = cast("dict[str, Any]", vars(session).get("_residents") or vars(session)["_states"])
    return {name: value.numpy().copy() for name, value in held.items()}


def hand_over(source: Session, target: Session) -> None:
    held = cast("dict[str, Any]", vars(target).get("_residents") or vars(target)["_states"])
    for name, data in states(source).items():
        held[name].update_inplace(data)


def answers_as_transformers(session: Session, name: str, last: int = 40) -> None:
    own = Decoder(session)
    rows = support.prompts([13, 5], seed=9)
    logits = own.prefill(rows)
    for step in range(last - 13):
        expected = [support.forward(name, row) for row in rows]
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        tokens = [int((7 * step + 3 * row) % 90) + 4 for row in range(2)]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        logits = own.decode(tokens)
    assert np.ptp(logits) > 1e-2


def test_a_package_that_verifies_drafts() -> None:
    folder = compiled("llama", "ai100", num_speculative_tokens=3)
    assert named_sizes(folder) == {
        "Prefill": {"batch_size": "2", "ctx_len": "48", "seq_len": "8", "num_logits_to_keep": "1"},
        "Decode": {"batch_size": "2", "ctx_len": "48", "seq_len": "4", "num_logits_to_keep": "4"},
    }
    assert shape_of(folder, "num_logits_to_keep") == ["num_logits_to_keep", 1]
    assert shape_of(folder, "logits") == ["batch_size", "num_logits_to_keep", 97]
    assert names_of(folder)[0][-1] == "num_logits_to_keep"


@pytest.mark.parametrize("target", TARGETS)
def test_drafts_of_several_lengths_in_one_package(target: str) -> None:
    session = opened(compiled("mistral", target, num_speculative_tokens=[0, 3]), target)
    sizes = [(s.phase, s.symbols["seq_len"], s.symbols["num_logits_to_keep"]) for s in session.specializations]
    assert sizes == [("prefill", 8, 1), ("decode", 1, 1), ("decode", 4, 4)]
    row = support.prompts([36], seed=2)[0]
    tokens = np.array([row, row[::-1]])
    logits_of(session, Run(tokens[:, :8], np.tile(np.arange(8), (2, 1))))
    at, lengths = 8, [4, 1, 4, 4, 1, 1, 4, 4, 4]
    for length in lengths:  # a wrong draft in each second run of four, which the next run overwrites
        given = tokens[:, at : at + length].copy()
        wrong = length == 4 and at % 2 == 0
        given[:, 2:] = (given[:, 2:] + 1) % 97 if wrong else given[:, 2:]
        found = logits_of(session, Run(given, np.tile(np.arange(at, at + length), (2, 1)), keep=length))
        for kept in range(2 if wrong else length):
            expected = [support.forward("mistral", r[: at + kept + 1].tolist()) for r in tokens]
            np.testing.assert_allclose(found[:, kept], expected, atol=1e-4)
        at += 2 if wrong else length


def test_a_package_that_reads_a_part_of_the_caches() -> None:
    asked = {"ctx_len": 256, "comp_ctx_lengths_prefill": [64], "comp_ctx_lengths_decode": "[64, 128]"}
    folder = compiled("gemma3", "ai100", **asked)
    assert {name: sizes["comp_ctx_lengths"] for name, sizes in named_sizes(folder).items()} == {
        "Prefill": "224",
        "Decode": "256",
    }
    assert shape_of(folder, "comp_ctx_lengths") == ["comp_ctx_lengths"]
    answers_as_transformers(opened(folder, "ai100"), "gemma3", last=20)
    own = Decoder(opened(folder, "ai100"))
    with pytest.raises(RuntimeInputError, match="no compiled shapes take a run of 2 rows and seq_len=8, comp_ctx_len"):
        own.prefill(support.prompts([230, 3]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_prefill_hands_its_caches_to_a_decoder(name: str, target: str) -> None:
    """Rings are as long in both packages, whatever runs they have."""
    ahead = opened(compiled(name, target, prefill_only=True, kv_cache_prefix="vllmKvCache"), target)
    behind = opened(compiled(name, target, prefill_only=False, kv_cache_prefix="vllmKvCache"), target)
    assert [(s.phase, s.symbols["seq_len"]) for s in ahead.specializations] == [("prefill", 8)]
    assert [(s.phase, s.symbols["seq_len"]) for s in behind.specializations] == [("decode", 1)]
    rows = support.prompts([29, 29], seed=4)
    Decoder(ahead).prefill([row[:24] for row in rows])
    hand_over(ahead, behind)
    found = np.zeros(0)
    for at in range(24, 29):
        found = logits_of(behind, Run(np.array([[row[at]] for row in rows]), np.full((2, 1), at)))[:, 0]
        np.testing.assert_allclose(found, [support.forward(name, row[: at + 1]) for row in rows], atol=1e-4)
    assert np.ptp(found) > 1e-2


@pytest.mark.parametrize("alone", [True, False])
def test_a_package_of_one_phase_answers_all_the_same(alone: bool) -> None:
    answers_as_transformers(opened(compiled("mistral", "onnxruntime", prefill_only=alone), "onnxruntime"), "mistral")


def test_a_decoder_of_one_token_has_one_phase() -> None:
    folder = compiled("llama", "ai100", prefill_seq_len=1, prefill_only=True)
    assert list(named_sizes(folder)) == ["Decode"]


def test_rings_that_are_to_keep_all_are_none() -> None:
    folder = compiled("mistral", "ai100", retain_full_kv=True)
    assert shape_of(folder, "past_key.0") == ["batch_size", 2, "ctx_len", 8]
    answers_as_transformers(opened(folder, "ai100"), "mistral", last=30)


@pytest.mark.parametrize("target", TARGETS)
def test_caches_have_the_names_that_a_host_selects_them_by(target: str) -> None:
    folder = compiled("llama", target, kv_cache_prefix="vllmKvCache")
    inputs, outputs = names_of(folder)
    assert inputs[:3] == ["input_ids", "position_ids", "past_key.0_vllmKvCache"]
    assert outputs[:3] == ["logits", "past_key.0_vllmKvCache_RetainedState", "past_value.0_vllmKvCache_RetainedState"]
    assert all("vllmKvCache" in name for name in outputs[1:])
    answers_as_transformers(opened(folder, target), "llama", last=16)
    if target == "ai100":
        assert "IOName: past_value.1_vllmKvCache\n" in (folder / "custom_io.yaml").read_text()


def test_states_of_a_recurrence_have_the_prefix_and_adapters_none() -> None:
    module = support.canonical("qwen3-next")
    lora = "lora{mode=single rank=2 targets=q_proj retained=true}"
    support.apply(module, f"last-logits,{lora},kv-cache-prefix{{prefix=a1}}")
    names = [resident.input for resident in module.residents]
    assert {"conv_state.0_a1", "recurrent_state.0_a1"} <= set(names)
    assert [name for name in names if not name.endswith("_a1")] == [a.input for a in module.adapters] != []


def test_a_model_is_compiled_as_the_incumbent_was_told_when_it_opened_it() -> None:
    """Drafts, lengths, copied heads and blocks in one package, whose engine takes a drafter."""
    config = {
        "speculative_model_type": "target", "ccl_enabled": True, "max_top_k_ids": 512,
        "replicate_kv_heads": 2, "enable_blocking": True, "blocking_mode": "h", "head_block_size": 2,
    }  # fmt: skip
    model = QEFFAutoModelForCausalLM(support.tiny("llama")[1], continuous_batching=False, qaic_config=config)
    model.compile(target="ai100", emit_only=True, prefill_seq_len=8, ctx_len=64, num_speculative_tokens=3)
    folder = model.package.folder
    assert {name: (s["comp_ctx_lengths"], s["seq_len"]) for name, s in named_sizes(folder).items()} == {
        "Prefill": ("32", "8"),
        "Decode": ("64", "4"),
    }
    assert shape_of(folder, "past_key.0")[1] == 2 * support.tiny("llama")[0].num_key_value_heads
    tokens = support.prompts([5], seed=3)[0] * 3
    with model.engine(drafter=PromptLookup()) as engine:
        found = [emitted.token for emitted in engine.submit(Job(tokens, 20))]
    for token in found:
        assert token == int(support.forward("llama", tokens).argmax())
        tokens = [*tokens, token]


@pytest.mark.parametrize("target", TARGETS)
def test_rows_lengths_drafts_and_names_in_one_package(target: str) -> None:
    model = QEFFAutoModelForCausalLM(support.tiny("gemma3")[1], continuous_batching=True)
    asked: dict[str, Any] = {
        "full_batch_size": 3,
        "num_speculative_tokens": 3,
        "ccl_enabled": True,
        "kv_cache_prefix": "host",
    }
    model.compile(target=target, emit_only=target == "ai100", prefill_seq_len=8, ctx_len=64, **asked)
    rows = [2 * support.prompts([size], seed=size)[0] for size in (4, 9, 3, 6)]
    with model.engine(drafter=PromptLookup()) as engine:
        tickets = [engine.submit(Job(row, 12)) for row in rows]
        answers = [[emitted.token for emitted in ticket] for ticket in tickets]
        assert engine.slots == 3 and engine.stats().accepted > 5
    for row, answer in zip(rows, answers, strict=True):
        for end, token in enumerate(answer):
            assert token == int(support.forward("gemma3", [*row, *answer[:end]]).argmax())


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("qwen3-next", {"num_speculative_tokens": 3}, "conv_state.0 keeps no token of its own"),
        ("llama", {"num_speculative_tokens": 0}, "num_speculative_tokens=0 verifies no draft"),
        ("llama", {"num_speculative_tokens": -1}, "num_speculative_tokens must be whole numbers of at least 0, not -1"),
        ("llama", {"prefill_only": 1}, "prefill_only must be True or False or None, not 1"),
        ("llama", {"comp_ctx_lengths_decode": "all"}, "comp_ctx_lengths_decode must be whole numbers of at least 1"),
    ],
)
def test_what_cannot_be_is_told(name: str, options: dict[str, Any], what: str) -> None:
    with pytest.raises(CompileError, match=what):
        compiled(name, "onnxruntime", **options)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"num_speculative_tokens": 7}, "8 tokens are also the length of a prefill run"),
        ({"kv_cache_prefix": "vllm_Kv"}, "the prefix of caches is 'vllm_Kv': give letters and digits"),
    ],
)
def test_what_a_pass_refuses_is_told(options: dict[str, Any], what: str) -> None:
    with pytest.raises(PassError, match=what):
        compiled("llama", "ai100", **options)
