"""Copied key/value heads: every target answers as before, with caches of more heads, and what is copied is weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import find_backend
from passes.replicate_kv_heads import ReplicateKvHeads
from qeff_ir.arrays import Array
from qeff_ir.compiler import compile_model
from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.ir.snapshot import load_module
from qeff_ir.passing import Pipeline, Rewriter, run_pipeline
from qeff_ir.passing.manager import PassRun
from qeff_ir.passing.weights import repeated, stored
from qeff_ir.quantized import quantized
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.testing.kit import NotHeldError, hold_package, hold_pass, planted
from tests import support

PLACE = "kv-retention"


def pipeline(target: str, text: str) -> Pipeline:
    return Pipeline.parse(find_backend(target).pipeline).insert_before(PLACE, text)


def copied(name: str, target: str = "onnxruntime", text: str = "replicate-kv-heads{n=2}") -> tuple[Module, PassRun]:
    module = support.canonical(name)
    steps = Pipeline.parse(support.rest_of(target)).insert_before(PLACE, text)
    report = run_pipeline(module, steps, check=2)
    return module, next(run for run in report.runs if run.id == "replicate-kv-heads")


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, "weights") for name in ("llama", "gemma3", "qwen2", "gpt-oss")] + [("phi3", "keys or values")],
)
def test_it_answers_as_before(name: str, rule: str, target: str, tmp_path: Path) -> None:
    module, run = copied(name, target)
    plain = support.canonical(name)
    assert set(run.stats.fired) == {rule} and run.stats.missed == []
    assert [state.shape[1] for state in module.states] == [2 * int(state.shape[1]) for state in plain.states]
    support.answers_alike(module, plain, target, tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gpt2", "a key/value head of its own"), ("deepseek-v3", "latent attention"), ("llama", "not divided")],
)
def test_what_cannot_be_copied_is_refused(name: str, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        copied(name, text=f"replicate-kv-heads{{n={5 if name == 'llama' else 2}}}")


@pytest.mark.parametrize(("devices", "heads"), [(1, 2), (2, 2), (3, 2), (4, 4), (8, 4), (12, 4)])
def test_the_number_of_devices_gives_the_number_of_copies(devices: int, heads: int) -> None:
    """Four query heads on two key/value heads: no more than two copies, which four devices share."""
    module, run = copied("llama", text=f"replicate-kv-heads{{devices={devices}}}")
    assert {state.shape[1] for state in module.states} == {heads}
    assert bool(run.stats.fired) == (heads == 4) and bool(run.stats.missed) == (heads == 2)


def test_the_option_of_the_target_is_the_number_of_devices(tmp_path: Path) -> None:
    options, source = {"prefill_seq_len": 8, "ctx_len": 48, "num_devices": 4}, support.Lowered("llama")
    edits = f"+replicate-kv-heads<{PLACE}"
    made = compile_model(source, options, target="ai100", pipeline=edits, out=tmp_path / "p", emit_only=True)
    (file,) = made.folder.glob("*.onnx")
    assert {state.shape[1] for state in load_module(file).states} == {4}


def adapted_answers(folder: Path, mode: str, *more: str) -> list[Array]:
    """What a model with random adapters of its keys and values answers, the first row with one, the other without."""
    module, backend = support.canonical("qwen2"), find_backend("onnxruntime")
    steps = Pipeline.parse(support.rest_of("onnxruntime"))
    for text in (f'lora{{mode={mode} n=2 rank=3 targets="k_proj,v_proj" bias=targets}}', *more):
        steps = steps.insert_before(PLACE, text)
    (*_, run) = (run for run in run_pipeline(module, steps, check=2).runs if run.id in ("lora", "replicate-kv-heads"))
    assert set(run.stats.fired) == ({"weights"} if more else {"linear"})
    backend.emit(module, folder, support.OPTIONS)
    decoder, random = Decoder(backend.open(folder, threads=1)), np.random.default_rng(0)
    for item in module.adapters:
        values = random.standard_normal(item.sizes).astype(np.float32)
        decoder.session.write(item.input, values, 1 if item.slots else None)
    decoder.lora_ids[:] = [1, 0] if mode == "slots" else 0
    return [decoder.prefill(support.PROMPTS), decoder.decode([5, 6])]


@pytest.mark.parametrize("mode", ["slots", "single"])
def test_adapters_of_copied_layers_are_followed(mode: str, tmp_path: Path) -> None:
    """Factors and biases are those of the checkpoint's layers; what they add to keys and values is copied too."""
    plain = adapted_answers(tmp_path / "plain", mode)
    np.testing.assert_allclose(adapted_answers(tmp_path / "copied", mode, "replicate-kv-heads{n=2}"), plain, atol=1e-5)
    base = support.open_decoder(support.canonical("qwen2"), tmp_path / "base").prefill(support.PROMPTS)
    assert np.abs(base[0] - plain[0][0]).max() > 1e-3


def test_quantized_weights_stay_codes() -> None:
    module = support.canonical("llama")
    support.apply(module, "quantize-weights{block=16},replicate-kv-heads{n=2}")
    names = [name for name in module.graph.initializers if name.endswith("_2_times")]
    assert len(names) == len(module.states)
    assert all(quantized(module.graph.initializers[name].const_value) is not None for name in names)


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
def test_it_holds_on_drawn_decoders(target: str) -> None:
    item = ReplicateKvHeads(devices=4)
    held = hold_pass(item, target=target, pipeline=pipeline(target, "replicate-kv-heads{devices=4}"), examples=12)
    assert held.fired["weights"] > 0
    steps = pipeline(target, "replicate-kv-heads{devices=4}")
    assert hold_package(item, target=target, pipeline=steps, examples=12).changed > 0


def test_heads_in_another_order_are_told() -> None:
    wrong = "np.concatenate([blocks] * times, axis=axis)"
    steps = pipeline("onnxruntime", "replicate-kv-heads{devices=4}")
    with planted(repeated, "np.repeat(blocks, times, axis=axis)", wrong), pytest.raises(NotHeldError):
        hold_pass(ReplicateKvHeads(devices=4), pipeline=steps, examples=30, shrink=False)


def test_it_stands_before_the_layout() -> None:
    with pytest.raises(PassError, match=r"write \+replicate-kv-heads<kv-retention"):
        support.apply(support.canonical("llama"), "kv-retention{layout=tensor-scatter},replicate-kv-heads")


def test_features_that_are_not_blocks_are_refused() -> None:
    module = support.canonical("llama")
    weight = next(found for node in module.graph if (found := stored(node)) is not None)
    with pytest.raises(PassError, match="has 32 features: they are not blocks of 5"):
        repeated(Rewriter(module, "test"), "x", weight.value, 0, 5, 2)
