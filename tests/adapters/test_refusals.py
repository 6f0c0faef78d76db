"""Adapters that do not fit are refused by name and reason, and the running session goes on unharmed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qeff_ir import QEffAutoPeftModelForCausalLM, QEffPeftModelForCausalLM
from qeff_ir.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, open_adapter
from qeff_ir.demo import ADAPTERS_FOLDER
from qeff_ir.errors import AdapterError, ModelLoadError
from tests import support
from tests.adapters.random_adapters import base, make

NAME = "llama"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make(base(NAME), folder, 0, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture(scope="module")
def running(good: Path) -> QEffAutoPeftModelForCausalLM:
    """A session with one adapter and one more slot, for adapters of rank 8 on the same layers."""
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    model.load_adapter(good, "good")
    model.compile(target="onnxruntime", adapter_slots=2, max_lora_rank=8, batch_size=2, prefill_seq_len=8, ctx_len=32)
    model.use_adapters(["good", None])
    return model


def configured(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def stored(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE)


def other_rank(folder: Path) -> None:
    shutil.rmtree(folder)
    make(base(NAME), folder, 1, r=16, target_modules=["q_proj"])


def other_module(folder: Path) -> None:
    shutil.rmtree(folder)
    make(base(NAME), folder, 1, r=2, target_modules=["down_proj"])


def other_shape(folder: Path) -> None:
    stored(folder, lambda tensors: {k: t[:, :16].contiguous() if "lora_A" in k else t for k, t in tensors.items()})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-10])


def half(folder: Path) -> None:
    stored(folder, lambda tensors: {k: t for k, t in tensors.items() if "lora_B" not in k})


def whole_module(folder: Path) -> None:
    stored(folder, lambda tensors: {**tensors, "base_model.model.lm_head.weight": torch.ones(97, 32)})


def no_rank(folder: Path) -> None:
    stored(folder, lambda ts: {k: (t[:0] if "lora_A" in k else t[:, :0]).contiguous() for k, t in ts.items()})
    configured(folder, r=0)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rank": (other_rank, "rank 16 in model.layers.0.self_attn.q_proj"),
    "module": (other_module, "no branch"),
    "shape": (other_shape, "features"),
    "pickle": (pickled, "adapter_model.bin"),
    "truncated": (truncated, "damaged"),
    "half": (half, "only one of the factors"),
    "whole module": (whole_module, "lm_head.weight of its own"),
    "not json": (lambda f: _write(f / CONFIG_FILE, "{"), "cannot be read"),
    "dora": (lambda f: configured(f, use_dora=True), "DoRA"),
    "modules_to_save": (lambda f: configured(f, modules_to_save=["lm_head"]), "modules_to_save"),
    **{
        start: (lambda f, start=start: configured(f, init_lora_weights=start), "changes the base model")
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    **{
        name: (lambda f, given={name: value}: configured(f, **given), what)
        for name, value, what in (
            ("alora_invocation_tokens", [5, 6], "active from a token on only"),
            ("trainable_token_indices", [5, 6], "replaces rows of an embedding"),
            ("layer_replication", [[0, 2], [1, 2]], "repeats layers"),
            ("use_qalora", True, "QALoRA"),
            ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
            ("arrow_config", {"top_k": 2}, "routes between adapters"),
            ("kasa_config", {"beta": 0.1}, "KaSA"),
            ("monteclora_config", {"monteclora_n": 8}, "MonteCLoRA"),
            ("velora_config", {"num_groups": 8}, "VeLoRA"),
            ("megatron_config", {"size": 2}, "Megatron"),
            ("ensure_weight_tying", True, "ties its own weights"),
        )
    },
    "type": (lambda f: configured(f, peft_type="IA3"), "only LORA"),
    "config of another": (lambda f: configured(f, r=2), "not of one adapter"),
    "alpha": (lambda f: configured(f, lora_alpha="8"), "which is no number"),
    "alpha not finite": (lambda f: configured(f, lora_alpha=float("nan")), "which is no number"),
    "alpha pattern": (lambda f: configured(f, alpha_pattern={"q_proj": None}), "which is no number"),
    "rank pattern": (
        lambda f: configured(f, rank_pattern={"(": 4}),
        "rank_pattern, alpha_pattern or target_parameters",
    ),
    "target parameters": (lambda f: configured(f, target_parameters=[5]), "alpha_pattern or target_parameters"),
    "no rank": (no_rank, "rank 0: the two files"),
    "rslora": (lambda f: configured(f, use_rslora="false"), "use_rslora='false'"),
    "base": (lambda f: configured(f, base_model_name_or_path=5), "which is no name"),
    "nested": (lambda f: _write(f / CONFIG_FILE, "[" * 100_000), "cannot be read"),
    "not finite": (lambda f: stored(f, lambda ts: {k: t / 0 for k, t in ts.items()}), "not finite"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "no adapter_config.json"),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("case", CASES)
def test_a_refused_adapter_leaves_the_session_as_it_was(
    case: str, running: QEffAutoPeftModelForCausalLM, good: Path, tmp_path: Path
) -> None:
    spoil, reason = CASES[case]
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    spoil(folder)
    rows = support.prompts([5, 7])
    before = running.runner().decoder.prefill(rows)
    for name in ("new", "good"):  # neither beside the good one, nor in its place
        with pytest.raises(AdapterError, match="(?s)" + reason):
            running.load_adapter(folder, name)
    assert running.adapters == ["good"]
    assert np.array_equal(running.runner().decoder.prefill(rows), before)


def test_the_checks_let_a_good_adapter_in(running: QEffAutoPeftModelForCausalLM, good: Path) -> None:
    running.load_adapter(good, "twin")
    with pytest.raises(AdapterError, match="no slot is free for the adapter 'third'"):
        running.load_adapter(good, "third")
    running.delete_adapter("twin")
    assert running.adapters == ["good"]


def test_an_adapter_of_another_base_model_is_refused(good: Path, tmp_path: Path) -> None:
    from qeff_ir.frontend.providers.memory import Memory
    from qeff_ir.frontend.source import Source

    provider = Memory(base(NAME))
    provider.config = copy.deepcopy(provider.config)
    provider.config._name_or_path = "somebody/small-model"
    model = QEffAutoPeftModelForCausalLM._opened(Source(provider))
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    configured(folder, base_model_name_or_path="somebody/large-model")
    with pytest.raises(AdapterError, match=r"large-model.*small-model"):
        model.load_adapter(folder, "other")
    model.load_adapter(folder, "other", check_base_model=False)
    configured(folder, base_model_name_or_path="/elsewhere/small-model")
    model.load_adapter(folder, "copy")
    assert model.adapters == ["other", "copy"]


def test_names_that_are_not_loaded(running: QEffAutoPeftModelForCausalLM) -> None:
    for call in (running.set_adapter, running.delete_adapter, running.merge_adapter):
        with pytest.raises(AdapterError, match="there is no adapter 'nobody'"):
            call("nobody")
    for wrong in ([5], [["good"]], ["nobody"]):
        with pytest.raises(AdapterError, match="there is no adapter"):
            running.use_adapters([*wrong, None])  # pyright: ignore[reportArgumentType]
    with pytest.raises(AdapterError, match="'base'"):
        running.load_adapter("anywhere", "base")
    for name in ("base", "", None):  # 'base' and None would be answered by the base model
        with pytest.raises(AdapterError, match="cannot be called"):
            QEffAutoPeftModelForCausalLM.from_pretrained("anywhere", name)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", [None, 5, 0.5, "", b"x", "a\0b", [], {}])
def test_what_is_no_path_is_no_adapter(name: Any) -> None:
    with pytest.raises(AdapterError, match="the adapter"):
        open_adapter(name)


def test_sizes_that_are_no_numbers_are_refused(good: Path) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    for size in ("adapter_slots", "max_lora_rank"):
        for value in (0, "4", 1.5, True):
            with pytest.raises(AdapterError, match=f"{size} is {value!r}"):
                model.compile(target="onnxruntime", **{size: value})  # pyright: ignore[reportArgumentType]


def test_nothing_is_merged_into_a_package(running: QEffAutoPeftModelForCausalLM, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    configured(folder, base_model_name_or_path="/where/the/base/was")
    model = QEffAutoPeftModelForCausalLM.from_package(running.package.folder)
    model.load_adapter(folder, "good")  # what its base was called, a package does not know
    with pytest.raises(AdapterError, match="nothing is merged"):
        model.merge_adapter("good")
    assert model.adapters == ["good"]
    assert model.package.folder == running.package.folder


def test_what_is_no_peft_model_is_refused() -> None:
    with pytest.raises(AdapterError, match="no PeftModelForCausalLM"):
        QEffPeftModelForCausalLM(base(NAME))


def test_a_model_with_an_adapter_in_its_weights_is_refused(tmp_path: Path) -> None:
    """It would be there twice."""
    peft_model: Any = make(base(NAME), tmp_path, 0, r=4, target_modules=["q_proj"])
    peft_model.base_model.merge_adapter()
    with pytest.raises(AdapterError, match=r"an adapter is merged into the model's weights: call unmerge_adapter\(\)"):
        QEffPeftModelForCausalLM(peft_model).compile(target="onnxruntime", prefill_seq_len=8, ctx_len=48)


def test_what_from_pretrained_cannot_do_is_refused(good: Path) -> None:
    """Before the base model is looked for; what asks for what happens anyway is taken, as by the other classes."""
    with pytest.raises(ModelLoadError, match="does not support dtype='float16': leave it out"):
        QEffAutoPeftModelForCausalLM.from_pretrained(good, dtype="float16")
    model = QEffAutoPeftModelForCausalLM.from_pretrained(
        ADAPTERS_FOLDER / "subtract", dtype=torch.float32, local_files_only=True
    )
    assert model.adapters == ["default"]
