"""Adapters on every architecture: each row of a mixed batch answers as PEFT does, in both modes, on both targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import find_backend
from qeff_ir import QEffAutoPeftModelForCausalLM, numerics
from qeff_ir.testing.trace import Trace, compare, reference_trace, session_trace
from tests import support
from tests.adapters.random_adapters import base, make, rows_reference

STEPS = 3
RANKS = (1, 8, 64)
PROMPTS = support.prompts([11, 5, 19, 8])
COMPILE: dict[str, Any] = {"batch_size": 4, "prefill_seq_len": 8, "ctx_len": 48}

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 3}},
        {"target_modules": ["down_proj", "lm_head", "embed_tokens"], "alpha_pattern": {"embed_tokens": 9}},
    ),
    "gpt2": (
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": "all-linear", "fan_in_fan_out": True, "bias": "all", "alpha_pattern": {"c_fc": 3}},
        {"target_modules": ["mlp.c_proj", "wte", "wpe"], "fan_in_fan_out": True},
    ),
    "qwen3": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "alpha_pattern": {"k_proj": 3}},
        {"target_modules": r".*\.0\.(self_attn|mlp)\.(k|down)_proj", "rank_pattern": {"k_proj": 2}, "use_rslora": True},
    ),
    "gemma3": (
        {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 5}},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},
    ),
    "mixtral": (
        {"target_modules": ["q_proj", "o_proj"]},
        {
            "target_modules": ["gate", "k_proj"],  # the former is a parameter to PEFT, which no pattern of layers names
            "rank_pattern": {"gate.weight": 3, "k_proj": 5},
            "alpha_pattern": {"gate": 90},
        },
        {"target_modules": ["lm_head"]},
    ),
    "phi3": (
        {"target_modules": ["qkv_proj"]},
        {"target_modules": "all-linear", "lora_bias": False},
        {"target_modules": ["gate_up_proj"]},
    ),
    "bloom": (
        {"target_modules": ["query_key_value"], "bias": "lora_only"},
        {"target_modules": "all-linear", "lora_bias": True, "alpha_pattern": {"query_key_value": 3}},
        {"target_modules": ["dense_4h_to_h", "word_embeddings"], "rank_pattern": {"word_embeddings": 5}},
    ),
}
"""Of each model, the targets of the adapters of rank 1, 8 and 64."""

TARGETS = ("onnxruntime", "ai100")


class Case:
    """A model with its adapters, on disk and in PEFT."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folders = [folder / f"r{rank}" for rank in RANKS]
        self.models = [
            make(base(name), path, seed, r=rank, lora_alpha=2 * rank, **config)
            for seed, (path, rank, config) in enumerate(zip(self.folders, RANKS, CONFIGS[name], strict=True))
        ]
        self.mixed = rows_reference([base(name), *self.models], PROMPTS, STEPS)
        self.bound = numerics.bound(numerics.depth(support.lowered(name)))

    def compiled(self, target: str, **options: Any) -> QEffAutoPeftModelForCausalLM:
        model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(self.name))
        for rank, folder in zip(RANKS, self.folders, strict=True):
            model.load_adapter(folder, f"r{rank}")
        model.compile(target=target, emit_only=target == "ai100", **COMPILE, **options)
        return model


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("adapters"))


def row_errors(found: Trace, wanted: Trace) -> list[float]:
    """The largest error of each row."""
    rows = range(wanted.logits.shape[1])
    return [
        max(numerics.error_over_rms(a[row], b[row]) for a, b in zip(found.logits, wanted.logits, strict=True))
        for row in rows
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CONFIGS, indirect=True)
def test_every_row_of_a_mixed_batch_answers_as_peft_does(
    case: Case, target: str, record_property: Callable[[str, object], None]
) -> None:
    model = case.compiled(target)
    decoder = model.runner(threads=1).decoder
    model.use_adapters([None, "r1", "r8", "r64"])
    found = session_trace(decoder, PROMPTS, case.mixed.tokens)
    errors = row_errors(found, case.mixed)
    record_property("error/bound", max(errors) / case.bound)
    assert max(errors) <= case.bound
    assert compare(found, case.mixed).agreement == STEPS

    plain = support.plain_decoder(case.name, target, **COMPILE)
    alone = session_trace(plain, PROMPTS, case.mixed.tokens)
    assert np.array_equal(alone.logits[:, 0], found.logits[:, 0])
    decoder.lora_ids[:] = 0
    assert np.array_equal(session_trace(decoder, PROMPTS, case.mixed.tokens).logits, alone.logits)
    # The kill test: without its adapter, no row but the first passes.
    assert min(row_errors(alone, case.mixed)[1:]) > 100 * case.bound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CONFIGS, indirect=True)
def test_one_adapter_at_a_time_answers_as_peft_does(case: Case, target: str) -> None:
    model = case.compiled(target, lora_mode="single")
    decoder = model.runner(threads=1).decoder
    plain = session_trace(support.plain_decoder(case.name, target, **COMPILE), PROMPTS, case.mixed.tokens)
    for row, name in enumerate([None, "r1", "r8", "r64"]):
        model.use_adapters([name] * 4)
        found = session_trace(decoder, PROMPTS, case.mixed.tokens)
        assert row_errors(found, case.mixed)[row] <= case.bound
        assert np.array_equal(found.logits, plain.logits) == (name is None)


@pytest.mark.parametrize("row", [2, 3], ids=["r8", "r64"])
@pytest.mark.parametrize("case", CONFIGS, indirect=True)
def test_a_merged_adapter_answers_as_peft_does(case: Case, row: int) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(case.name))
    model.load_adapter(case.folders[row - 1], "it")
    model.merge_adapter("it")
    model.compile(target="onnxruntime", **COMPILE)
    found = session_trace(model.runner(threads=1).decoder, PROMPTS, case.mixed.tokens)
    errors = row_errors(found, case.mixed)
    assert errors.pop(row) <= case.bound
    assert min(errors) > 100 * case.bound  # the kill test: nobody else's answer is that


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_rows_and_tokens_may_be_one_axis(case: Case) -> None:
    """As the products of this model come, with a bias of their own: every row finds its adapter all the same."""
    pipeline = find_backend("onnxruntime").pipeline.replace("unflatten,", "")
    assert "unflatten" not in pipeline
    model = case.compiled("onnxruntime", pipeline=pipeline)
    decoder = model.runner(threads=1).decoder
    model.use_adapters([None, "r1", "r8", "r64"])
    assert max(row_errors(session_trace(decoder, PROMPTS, case.mixed.tokens), case.mixed)) <= case.bound


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "slots"])
def test_the_bias_of_a_layer_and_that_of_its_branch_add_up(merged: bool, tmp_path: Path) -> None:
    targets = ["query_key_value"]
    peft_model = make(base("bloom"), tmp_path, 0, r=4, target_modules=targets, bias="all", lora_bias=True)
    wanted = rows_reference([peft_model] * 4, PROMPTS, STEPS)
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered("bloom"))
    model.load_adapter(tmp_path, "it")
    if merged:
        model.merge_adapter("it")
    model.compile(target="onnxruntime", **COMPILE)
    decoder = model.runner(threads=1).decoder
    if not merged:
        model.use_adapters(["it"] * 4)
    errors = row_errors(session_trace(decoder, PROMPTS, wanted.tokens), wanted)
    assert max(errors) <= numerics.bound(numerics.depth(support.lowered("bloom")))


def test_the_reference_sees_the_adapter(tmp_path: Path) -> None:
    peft_model: Any = make(base("llama"), tmp_path, 0, r=4, target_modules=["q_proj"])
    with_it = reference_trace(peft_model, PROMPTS[:1], 2)
    with peft_model.disable_adapter():
        without = reference_trace(peft_model, PROMPTS[:1], 2)
    assert numerics.error_over_rms(with_it.logits[0], without.logits[0]) > 1e-3
