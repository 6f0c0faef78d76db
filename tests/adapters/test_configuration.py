"""An adapter's configuration is taken as PEFT takes it, whatever its spelling, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file

from qeff_ir.adapters import configuration
from qeff_ir.adapters.folder import WEIGHTS_FILE, Adapter, read_adapter
from qeff_ir.errors import AdapterError
from tests.adapters.random_adapters import base, make

NAME = "llama"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors for all linear layers."""
    folder = tmp_path_factory.mktemp("good")
    make(base(NAME), folder, 0, r=4, target_modules="all-linear")
    return folder


def changed(good: Path, folder: Path, **fields: Any) -> Path:
    shutil.copytree(good, folder, dirs_exist_ok=True)
    path = folder / configuration.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def renamed(folder: Path, old: str, new: str) -> Path:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def by_peft(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base(NAME)), str(folder))


def by_us(folder: Path) -> Adapter | None:
    try:
        return read_adapter(folder)
    except AdapterError:
        return None


def branches(model: Any) -> dict[str, float]:
    """The layers that PEFT has given something to add, with the scaling of it."""
    found: dict[str, float] = {}
    for name, module in model.base_model.model.named_modules():
        if (
            isinstance(module, LoraLayer)
            and module.lora_B
            and module.lora_B["default"].get_parameter("weight").abs().sum() > 0
        ):
            found[name] = module.scaling["default"]
    return found


def test_every_field_of_peft_is_applied_harmless_or_refused() -> None:
    groups = [configuration.REFUSED, configuration.APPLIED, configuration.CHECKED, configuration.HARMLESS]
    known = [name for group in groups for name in group]
    assert sorted(known) == sorted(f.name for f in dataclasses.fields(LoraConfig))


STARTS = [
    True, False, None, 0, 1, "", "true", "gaussian", "Gaussian", "eva", "EVA", "orthogonal", "mica", "Mica", "pissa",
    "PiSSA", "pissa_niter_4", "pissa_niter_x", "olora", "OLoRA", "OLORA", "corda", "loftq", "lora_ga", "new",
]  # fmt: skip


def test_no_start_that_changes_the_base_model_is_taken(good: Path, tmp_path: Path) -> None:
    """As PEFT has each spelling: what is taken here, it loads without a change of the base model's weights."""
    before = base(NAME).state_dict()["model.layers.0.self_attn.q_proj.weight"]
    taken: list[Any] = []
    for index, start in enumerate(STARTS):
        folder = changed(good, tmp_path / str(index), init_lora_weights=start)
        if by_us(folder) is None:
            continue
        taken.append(start)
        try:
            model = by_peft(folder)
        except (ValueError, AttributeError):
            assert start == "EVA"  # which it does not read
            continue
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert torch.equal(layer.base_layer.weight, before), start
    assert taken == [True, False, None, "gaussian", "Gaussian", "eva", "EVA", "orthogonal", "mica", "Mica"]


ENDINGS = ["self_attn.q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SELECTIONS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "All-Linear"},
    "an expression": {"target_modules": r".*\.(q|k|v|o)_proj|.*\.mlp\.\w+_proj"},
    "paths": {
        "target_modules": ["self_attn.q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    },
    "every layer by number": {"target_modules": ENDINGS, "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "scaled": {"lora_alpha": 2.5, "use_rslora": True, "alpha_pattern": {r"layers\.0\..*q_proj": 3, "mlp.up_proj": 1}},
    "nothing is left out": {"exclude_modules": ["no_proj"]},
    "fan in": {"fan_in_fan_out": True},
    "for training": {"lora_dropout": 0.5, "inference_mode": False, "task_type": None},
    "features": {"task_type": "FEATURE_EXTRACTION"},
}
PARTS: dict[str, dict[str, Any]] = {
    "fewer targets": {"target_modules": ["q_proj"]},
    "an expression that ends early": {"target_modules": r".*\.q"},
    "an ending of a word": {"target_modules": ["proj"]},
    "one layer": {"target_modules": ENDINGS, "layers_to_transform": 1},
    "layers of another list": {"target_modules": ENDINGS, "layers_to_transform": [0, 1], "layers_pattern": "blocks"},
    "excluded": {"exclude_modules": r".*\.mlp\..*"},
    "excluded by name": {"exclude_modules": ["down_proj"]},
    "none": {"target_modules": []},
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_layers_and_scalings_are_those_of_peft(case: str, good: Path, tmp_path: Path) -> None:
    folder = changed(good, tmp_path, **SELECTIONS[case])
    found = read_adapter(folder)
    expected = branches(by_peft(folder))
    assert {path: factors.scaling for path, factors in found.layers.items()} == pytest.approx(expected)
    assert len(expected) == 14


@pytest.mark.parametrize("case", PARTS)
def test_factors_that_peft_would_leave_out_are_refused(case: str, good: Path, tmp_path: Path) -> None:
    folder = changed(good, tmp_path, **PARTS[case])
    try:
        loaded = branches(by_peft(folder))
    except ValueError:  # no layer is left
        loaded = {}
    assert len(loaded) < 14
    with pytest.raises(AdapterError, match="which its target_modules do not name, so that PEFT would leave"):
        read_adapter(folder)


KEYS: dict[str, tuple[str, str]] = {
    "no prefix": (PREFIX, ""),
    "two prefixes": (PREFIX, PREFIX * 2),
    "compiled": (PREFIX, f"{PREFIX}_orig_mod."),
    "compiled in parts": ("layers.0.", "layers.0._orig_mod."),
    "distributed": (PREFIX, f"{PREFIX}module."),
    "sharded": (PREFIX, f"{PREFIX}_fsdp_wrapped_module."),
    "an adapter's name": ("lora_A.weight", "lora_A.other.weight"),
    "capitals": ("lora_A.weight", "LORA_A.weight"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_peft_would_not_find_are_refused(case: str, good: Path, tmp_path: Path) -> None:
    old, new = KEYS[case]
    folder = renamed(changed(good, tmp_path), old, new)
    whole = load_file(good / WEIGHTS_FILE)
    found = branches(by_peft(folder))
    loaded = by_peft(folder).base_model.model.state_dict()
    key = "model.layers.0.self_attn.q_proj"
    read = torch.equal(loaded[f"{key}.lora_A.default.weight"], whole[f"{PREFIX}{key}.lora_A.weight"])
    assert not (found and read)
    with pytest.raises(AdapterError, match=r"PEFT would leave it out|no part of a|only one of"):
        read_adapter(folder)


def test_biases_that_peft_would_not_find_are_refused(good: Path, tmp_path: Path) -> None:
    key = f"{PREFIX}model.layers.0.self_attn.q_proj"
    for extra, fields, reason in (
        (f"{key}.lora_B.bias", {}, "lora_bias=false, so that PEFT would"),
        (f"{key}.bias", {"bias": "all"}, "which PEFT would leave out"),
        (f"{PREFIX}lm_head.base_layer.bias", {"bias": "all"}, "which PEFT would leave out"),
    ):
        folder = changed(good, tmp_path / reason[:9], **fields)
        save_file({**load_file(good / WEIGHTS_FILE), extra: torch.ones(16)}, folder / WEIGHTS_FILE)
        assert not any(torch.equal(t, torch.ones(16)) for t in by_peft(folder).state_dict().values())
        with pytest.raises(AdapterError, match=reason):
            read_adapter(folder)
    assert sum(1 for _ in tmp_path.iterdir()) == 2


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "a new variant": ({"use_nextlora": True}, "sets 'use_nextlora', a field that is not known here"),
    "a truth as text": ({"use_dora": "false"}, "DoRA"),
    "type in small letters": ({"peft_type": "lora"}, "of the type lora: only LORA"),
    "no type": ({"peft_type": None}, "of the type None"),
    "a head": ({"task_type": "SEQ_CLS"}, "made for the task 'SEQ_CLS'"),
    "no task": ({"task_type": "causal_lm"}, "made for the task 'causal_lm'"),
    "bias in capitals": ({"bias": "ALL"}, "bias='ALL'"),
    "rank as text": ({"r": "4"}, "r='4'"),
    "rank as truth": ({"r": True}, "r=True"),
    "rank as a fraction": ({"r": 4.0}, "r=4.0"),
    "a rank that is none": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern="),
    "targets of another type": ({"target_modules": [5]}, r"target_modules=\[5\]"),
    "targets that are no expression": ({"target_modules": "("}, "the targets, rank_pattern"),
    "layers as text": ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
    "excluded of another type": ({"exclude_modules": 5}, "exclude_modules=5"),
    "bias as text": ({"lora_bias": "none"}, "lora_bias='none'"),
    "fan in as text": ({"fan_in_fan_out": "true"}, "fan_in_fan_out='true'"),
    "revision": ({"revision": 5}, "revision=5"),
    "alpha": ({"lora_alpha": 10**400}, "which is no number"),
    "variant of another type": ({"eva_config": 5}, "no configuration that PEFT reads"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_what_cannot_be_read_as_meant_is_refused_by_name(case: str, good: Path, tmp_path: Path) -> None:
    fields, reason = FIELDS[case]
    with pytest.raises(AdapterError, match=reason):
        read_adapter(changed(good, tmp_path, **fields))


def test_fields_that_are_not_set_do_no_harm(good: Path, tmp_path: Path) -> None:
    assert read_adapter(changed(good, tmp_path, use_nextlora=False, other=None, more={})).rank == 4


@pytest.mark.parametrize("name", [configuration.CONFIG_FILE, WEIGHTS_FILE])
def test_an_adapter_is_read_in_its_own_folder_only(name: str, good: Path, tmp_path: Path) -> None:
    inside, secret = changed(good, tmp_path / "adapter"), tmp_path / "secret"
    (inside / name).rename(secret)
    (inside / name).symlink_to(secret)
    with pytest.raises(AdapterError, match=rf"{name} leads to .*secret, outside of"):
        read_adapter(inside)
    (inside / name).unlink()
    os.mkfifo(inside / name)
    with pytest.raises(AdapterError, match=rf"{name} is not a regular file"):
        read_adapter(inside)
