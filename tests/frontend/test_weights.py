"""Checkpoints: read by reference, converted as transformers converts, and damage told in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.capture.forward_attention import captured_forward
from qeff_ir.frontend.checkpoint.references import open_checkpoint
from qeff_ir.frontend.checkpoint.skeleton import build_skeleton
from qeff_ir.frontend.checkpoint.weights import Weights, checkpoint_weights, memory_weights
from qeff_ir.frontend.export.lower import lower
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.source import open_source
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import fingerprint
from qeff_ir.ranges import file_range
from tests import support
from tests.models import MODELS, build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            support.tiny(name)[1].save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.fixture
def llama(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that may be damaged."""
    return Path(shutil.copytree(saved("llama"), tmp_path / "llama"))


def assert_equal(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor.numpy(), other[name].numpy(), err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_has_the_weights_of_the_one_in_memory(name: str, saved: Callable[[str], Path]) -> None:
    """Converted layouts too: stacked experts are many tensors in the checkpoint."""
    folder = Folder(saved(name))
    assert_equal(
        checkpoint_weights(build_skeleton(folder.config), folder.checkpoint), memory_weights(support.tiny(name)[1])
    )


def test_experts_are_stored_one_by_one_and_stacked_lazily(saved: Callable[[str], Path]) -> None:
    """That the above is a test of conversion at all: the checkpoint's layout is another one."""
    folder = Folder(saved("mixtral"))
    weights = checkpoint_weights(build_skeleton(folder.config), folder.checkpoint)
    stacked = {n for n in weights if ".experts." in n}
    assert stacked and not stacked & set(folder.checkpoint.entries)
    assert {n for n in weights if file_range(weights[n]) is None} == stacked


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_lowering_a_folder_equals_lowering_from_memory(name: str, saved: Callable[[str], Path]) -> None:
    assert fingerprint(open_source(saved(name)).lower()) == fingerprint(support.lowered(name))


def test_computed_buffers_of_a_skeleton_are_those_of_the_model(saved: Callable[[str], Path]) -> None:
    for name in ("llama", "gpt-oss", "gemma3"):
        model, skeleton = support.tiny(name)[1], build_skeleton(open_source(saved(name)).config)
        buffers = dict(skeleton.named_buffers())
        assert buffers
        for key, buffer in model.named_buffers():
            if not buffers[key].is_meta:
                torch.testing.assert_close(buffers[key], buffer, rtol=0, atol=0)


def test_half_precision_becomes_float32_when_it_is_read(tmp_path: Path) -> None:
    model: Any = build("llama")[1]
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    folder = Folder(tmp_path)
    weights = checkpoint_weights(build_skeleton(folder.config), folder.checkpoint)
    expected = model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(weights["model.layers.1.mlp.up_proj.weight"].numpy(), expected)
    assert_equal(weights, memory_weights(model))


def vocabulary_weights(module: Module) -> list[str]:
    return [
        n for n, v in module.graph.initializers.items() if v.metadata_props.get(WEIGHT_KEY) and "97" in str(v.shape)
    ]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom"])
def test_tied_weights_are_one(name: str, saved: Callable[[str], Path]) -> None:
    assert len(vocabulary_weights(support.lowered(name))) == 1
    assert len(vocabulary_weights(open_source(saved(name)).lower())) == 1
    assert len(vocabulary_weights(support.lowered("llama"))) == 2  # the kill test: untied ones are two


def _registries() -> list[dict[str, Any]]:
    """Attention and mask functions of transformers by name."""
    return [dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]


def test_lowering_leaves_the_model_and_the_registries_as_they_were() -> None:
    model = support.tiny("mixtral")[1]
    registries, implementation = _registries(), model.config._attn_implementation
    experts = model.get_experts_implementation()
    weights = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    lower(model, memory_weights(model))
    assert _registries() == registries
    assert model.config._attn_implementation == implementation
    assert model.get_experts_implementation() == experts
    for name, parameter in model.named_parameters():
        assert id(parameter) == weights[name][0] and torch.equal(parameter, weights[name][1])


def test_capturing_a_forward_pass_leaves_the_experts_as_they_were() -> None:
    model = support.tiny("mixtral")[1]
    experts = model.get_experts_implementation()
    with captured_forward(model):
        assert model.get_experts_implementation() != experts
    assert model.get_experts_implementation() == experts


def test_a_model_that_cannot_be_traced_is_told_and_left_alone() -> None:
    _, model = build("llama")
    registries = _registries()
    model.model.layers[1].mlp.forward = lambda x: x * float(x.sum())
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot be ") as error:
        lower(model, memory_weights(model))
    assert "\n" not in str(error.value)
    assert _registries() == registries


def test_a_model_without_a_retainable_cache_is_told() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("rwkv", vocab_size=97, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    message = "RwkvForCausalLM writes to no cache, so there is no state to retain between tokens"
    with pytest.raises(UnsupportedModelError, match=f"^{message}$"):
        lower(model, memory_weights(model))


# Damage.


def cut_in_half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def wrong_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"garbagegarba"
    path.write_bytes(bytes(data))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def index_outside(folder: Path) -> None:
    no_weights(folder)  # an index beside them is not read
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "../model.safetensors"}})
    )


def index_of_a_missing_file(folder: Path) -> None:
    no_weights(folder)
    data = {"metadata": {}, "weight_map": {"a": "model-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))


def index_that_is_none(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[1]")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_that_is_none(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_of_nothing_known(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def code_of_its_own(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoConfig": "x.Y"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_in_half, "is not a whole safetensors file"),
        (empty_file, "is not a whole safetensors file"),
        (wrong_header, "is not a whole safetensors file"),
        (only_a_pickle, "has no model.safetensors (only pytorch_model.bin): save the model with save_pretrained"),
        (no_weights, "has no model.safetensors (no weights)"),
        (index_outside, "names '../model.safetensors', a file outside the model folder: refused"),
        (index_of_a_missing_file, "model-00001.safetensors is missing: download the model again"),
        (index_that_is_none, "is not a checkpoint index"),
        (no_config, "has no config.json, so it is not a model folder"),
        (config_that_is_none, "is not a configuration that transformers reads"),
        (config_of_nothing_known, "is not a configuration that transformers reads"),
        (code_of_its_own, "brings code of its own (auto_map in config.json)"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_damaged_folder_is_told(damage: Callable[[Path], None], message: str, llama: Path) -> None:
    open_source(llama)
    damage(llama)
    with pytest.raises(ModelLoadError) as error:
        open_source(llama)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["modeling_own.py", "own/layers/modeling.py"])
def test_code_that_may_run_is_part_of_what_a_folder_is(name: str, llama: Path) -> None:
    (llama / name).parent.mkdir(parents=True, exist_ok=True)
    found: list[tuple[Any, Any]] = []
    for text in ("WIDTH = 1", "WIDTH = 2"):
        (llama / name).write_text(text)
        trusted, plain = (open_source(llama, trust_remote_code=trust).identity() for trust in (True, False))
        found.append((trusted, plain))
    (one, same), (other, again) = found
    assert one != other
    assert same == again  # where it does not run, it does not matter


def test_a_missing_tensor_is_told(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    message = r"lacks 2 tensors of LlamaForCausalLM, the first is 'model\.layers\.1\.mlp\.up_proj\.weight'"
    with pytest.raises(ModelLoadError, match=message):
        open_source(llama).lower()


def test_a_tensor_of_another_shape_is_told(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"has shape \[31\], the configuration asks for \[32\]"):
        open_source(llama).lower()


def test_a_sharded_checkpoint_is_one(tmp_path: Path) -> None:
    support.tiny("llama")[1].save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    assert_equal(
        checkpoint_weights(build_skeleton(support.tiny("llama")[0]), checkpoint),
        memory_weights(support.tiny("llama")[1]),
    )


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "a/b/c"])
def test_what_is_no_folder_is_told(name: str) -> None:
    with pytest.raises(ModelLoadError, match=r"is not a model folder: give a folder with config\.json, or a hub id"):
        open_source(name)


def test_an_unknown_hub_id_is_told() -> None:
    with pytest.raises(ModelLoadError, match="neither a local folder nor a model that the hub or its cache has"):
        open_source("nobody/no-such-model-here")
