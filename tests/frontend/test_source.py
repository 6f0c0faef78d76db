"""Model folders from anywhere: what is read of one, once, and what is refused before it costs anything."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir import QEFFAutoModel, QEFFAutoModelForCausalLM
from qeff_ir.adapters.memory import PeftMemory
from qeff_ir.auto.arguments import hub_arguments
from qeff_ir.cache_key import input_digests, package_key
from qeff_ir.compiler import compile_model
from qeff_ir.errors import ModelLoadError, PackageError, QeffError, UnsupportedModelError
from qeff_ir.frontend.capture.attention import IMPLEMENTATION
from qeff_ir.frontend.checkpoint.config import read_config
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.providers.opening import find_folder
from qeff_ir.frontend.source import Source, open_source
from qeff_ir.frontend.tasks import EMBEDDING
from qeff_ir.package import MAIN
from qeff_ir.passing.pipeline import Pipeline
from tests import support
from tests.models import build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    support.tiny("llama")[1].save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A folder that may be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Side files.


@pytest.mark.parametrize(
    ("name", "put", "message"),
    [
        ("notes.txt", lambda p: p.symlink_to("/etc/passwd"), "outside of"),
        ("notes.txt", lambda p: p.symlink_to("nowhere"), "cannot be read (No such file"),
        ("extra.json", os.mkfifo, "is not a regular file"),
        ("config.json", os.mkfifo, "is not a regular file"),
        ("extra.json", lambda p: p.symlink_to("/dev/zero"), "outside of"),
        ("extra.json", Path.mkdir, "is not a regular file"),
        ("generation_config.json", Path.mkdir, "is not a regular file"),
        ("big.txt", lambda p: (p.touch(), os.truncate(p, 1 << 32)), "4,294,967,296 bytes, at most"),
        ("config.json", lambda p: p.write_text("[" * 5000 + "]" * 5000), "cannot be read as JSON"),
        ("config.json", lambda p: p.write_text("[1]"), "it is not a JSON object"),
        ("config.json", lambda p: p.write_bytes(b"\xff\xfe"), "is not a configuration that transformers reads"),
    ],
)
def test_side_files_stay_in_their_folder(name: str, put: Callable[[Path], object], message: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    put(model / name)
    with pytest.raises(ModelLoadError) as error:
        open_source(model)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_many_side_files_are_told_before_they_fill_the_memory(model: Path) -> None:
    for number in range(3):
        path = model / f"{number}.txt"
        path.touch()
        os.truncate(path, 250 << 20)
    with pytest.raises(ModelLoadError, match="bytes, at most 536,870,912 are read"):
        open_source(model)


def test_a_package_gets_what_was_there_when_the_folder_was_opened(model: Path, tmp_path: Path) -> None:
    source = open_source(model)
    before = {p.name: p.read_bytes() for p in model.glob("*.json")}
    identity = source.identity()
    configure(model, rms_norm_eps=0.5)
    (model / "generation_config.json").unlink()
    (model / "tokenizer.json").write_text("{}")
    out = tmp_path / "side"
    out.mkdir()
    source.save_side_files(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert source.identity() == identity and source.config.rms_norm_eps != 0.5


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(p.read_bytes() + b" "), Path.unlink], ids=["new", "gone"])
def test_weights_that_changed_since_the_folder_was_opened_are_told(
    change: Callable[[Path], object], model: Path, tmp_path: Path
) -> None:
    source = open_source(model)
    change(model / "model.safetensors")
    for act in (source.lower, source.weights, source.weight_files):
        with pytest.raises(ModelLoadError, match=r"model\.safetensors was changed or removed: open the model again$"):
            act()
    with pytest.raises(ModelLoadError, match="was changed or removed"):
        compile_model(source, CompileOptions(prefill_seq_len=4, ctx_len=8), target="onnxruntime", out=tmp_path / "o")


def test_weights_that_go_while_they_are_read_are_told(saved: Path, tmp_path: Path) -> None:
    support.tiny("mixtral")[1].save_pretrained(tmp_path)
    weights = open_source(tmp_path).weights()
    (tmp_path / "model.safetensors").unlink()
    stacked = next(t for n, t in weights.items() if "experts" in n)
    with pytest.raises(ModelLoadError, match="was changed or removed"):
        stacked.numpy()
    for data in (None, b"short"):
        if data is not None:
            (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(PackageError, match=r"model\.safetensors is gone or too short"):
            weights["model.norm.weight"].numpy()


# Configurations.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "no-such-function"}, "no-such-function"),
        ({"rope_parameters": {"rope_type": "no-such-rope", "rope_theta": 1e4}}, "no-such-rope"),
        ({"pad_token_id": 1000}, "transformers cannot make the model of type llama"),
        ({"vocab_size": -1}, "transformers cannot make the model of type llama"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 2_000}, "says num_hidden_layers=2000, and the checkpoint has 21 tensors"),
        ({"num_hidden_layers": 10**12}, "says num_hidden_layers=1000000000000"),
        ({"num_labels": 10**9}, "says num_labels=1000000000"),
        ({"text_config": {"encoder_layers": 10**9}}, "says encoder_layers=1000000000"),
        ({"head_dim": 10**9}, "has shape"),
        ({"hidden_size": 1 << 20}, "has shape"),
        ({"intermediate_size": 10**12}, "has shape"),
        ({"num_attention_heads": 0}, ""),
        ({"architectures": ["/abs/OUTSIDE"]}, "'/abs/OUTSIDE', which is not a plain name"),
        ({"architectures": ["../../x"]}, "which is not a plain name"),
        ({"architectures": ["-o"]}, "which is not a plain name"),
        ({"architectures": [5]}, "which is not a plain name"),
        ({"architectures": "LlamaForCausalLM"}, "has no list of architectures"),
        ({"configuration_files": ["config.5.0.0.json"]}, "(configuration_files), which is not supported"),
        ({"fusion_config": {"patch_embeddings": True}}, "(fusion_config), which is not supported"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "holds quantized weights"),
        ({"auto_map": {"AutoConfig": "evil.Evil"}}, "brings code of its own"),
        ({"model_type": None}, "is not a configuration that transformers reads"),
        ({"model_type": ["llama"]}, "is not a configuration that transformers reads"),
    ],
    ids=lambda v: str(v)[:50] if isinstance(v, dict) else "",
)
def test_a_configuration_that_makes_no_model_is_told(changes: dict[str, Any], message: str, model: Path) -> None:
    """In one sentence, and before gigabytes are taken or thousands of layers are built."""
    configure(model, **changes)
    tracemalloc.start()
    try:
        with pytest.raises(QeffError) as error:
            open_source(model).weights()
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert message in str(error.value) and "\n" not in str(error.value) and "/tmp/qeff-config" not in str(error.value)


def test_tables_of_gigabytes_are_told(tmp_path: Path) -> None:
    """Sizes that no tensor of the checkpoint contradicts."""
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    config = AutoConfig.for_model("gptj", n_positions=16, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert open_source(tmp_path).weights()
    configure(tmp_path, n_positions=1 << 40)
    with pytest.raises(QeffError, match=r"asks for tables of [\d,]+ GB in GPTJForCausalLM"):
        open_source(tmp_path).weights()


def test_layers_by_an_unknown_name_are_counted_while_they_are_built(model: Path) -> None:
    from qeff_ir.frontend.checkpoint.skeleton import empty_model

    config = read_config(model, False)
    config.num_hidden_layers = 10**6
    config.layer_types = None
    with pytest.raises(ModelLoadError, match="asks for more than 2,000 parameters"):
        empty_model(config, tensors=21)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_model_of_another_kind_is_told(kind: str, saved: Path, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    shutil.copy(saved / "model.safetensors", tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"type {kind}, which AutoModelForCausalLM does not load: open it"):
        open_source(tmp_path).lower()


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_implementations_of_a_configuration_are_not_taken(name: str, model: Path) -> None:
    """They could be code on the hub."""
    configure(model, **{name: "attacker/evil-kernel", "_experts_implementation": "attacker/evil-experts"})
    configure(model, inner=[{"deep": {name: "attacker/evil-kernel"}}])
    source = open_source(model)
    assert "attacker" not in repr(vars(source.config))
    assert source.opened()[0].config._attn_implementation in ("eager", "sdpa")
    assert source.reference().config._attn_implementation in ("eager", "sdpa")


def test_making_a_skeleton_does_not_change_what_a_folder_is(model: Path) -> None:
    configure(model, dtype="bfloat16")
    source = open_source(model)
    before = source.identity()
    source.weights()
    assert source.identity() == before


# What transformers acts on and we do not.


def test_an_adapter_beside_a_model_is_told(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    for opened in (QEFFAutoModelForCausalLM, QEFFAutoModel):
        with pytest.raises(UnsupportedModelError, match=r"holds an adapter beside the model .* QEffAutoPeftModelFor"):
            opened.from_pretrained(model)


def test_an_adapter_alone_names_the_class_that_opens_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for opened in (QEFFAutoModelForCausalLM, QEFFAutoModel):
        with pytest.raises(ModelLoadError, match="it is an adapter and not a model: open it with QEffAutoPeftModelFor"):
            opened.from_pretrained(tmp_path)


def test_a_generate_of_the_folders_own_is_told(model: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text("")
    open_source(model)  # transformers does not run it either
    with pytest.raises(UnsupportedModelError, match="replaces transformers' generate"):
        open_source(model, trust_remote_code=True)


def test_shards_of_one_name_both_count_for_the_cache(model: Path) -> None:
    """Two shards of one name in two folders: the package is another when either is changed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    keys = sorted(tensors)
    parts = {"a/x.safetensors": keys[:10], "b/x.safetensors": keys[10:]}

    def write(name: str) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        save_file({k: tensors[k] for k in parts[name]}, model / name)

    for name in parts:
        write(name)
    data = {"metadata": {}, "weight_map": {k: name for name, own in parts.items() for k in own}}
    (model / "model.safetensors.index.json").write_text(json.dumps(data))
    backend = find_backend("onnxruntime")
    seen: set[str] = set()
    for name in (None, *parts):
        if name is not None:
            tensors[parts[name][0]] = tensors[parts[name][0]] + 1
            write(name)
        steps = Pipeline.parse(backend.pipeline)
        source = open_source(model)
        seen.add(package_key(source, {}, backend, CompileOptions(), {MAIN: steps}, False, input_digests(source)))
    assert len(seen) == 3


# Models in memory.


class FirstToken(torch.nn.Module):
    """A pooling of the user's own that does something else while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.drop(hidden)[:, 0]


def test_a_model_with_adapters_keeps_its_training_mode() -> None:
    from peft import LoraConfig, get_peft_model

    _, model = build("llama")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    reference = Source(PeftMemory(adapted)).reference()
    assert not any(m.training for m in reference.modules())
    assert {id(p) for p in reference.parameters()} == {id(p) for p in adapted.parameters()}
    assert all(m.training for m in adapted.modules())


def test_a_model_keeps_its_training_mode() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=40, **sizes)).train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    source = Source(Memory(model))
    source.lower()
    pooling = FirstToken().train()
    lowered = ForwardSource(Memory(model.model), ForwardOptions(EMBEDDING, pooling=pooling)).lower()
    assert pooling.training and pooling.drop.training
    assert not [node for node in lowered.graph if "Random" in node.op_type or "Dropout" in node.op_type]
    reference = source.reference()
    assert not any(m.training for m in reference.modules())
    assert reference.lm_head.weight is model.lm_head.weight  # no copy of the weights
    assert [m.training for m in model.modules()] == before
    assert model.config._attn_implementation != IMPLEMENTATION
    model.eval()
    assert source.reference() is model


def test_the_training_mode_is_kept_when_lowering_fails() -> None:
    _, model = build("llama")
    model.train()
    model.model.layers[1].mlp.forward = lambda x: x * float(x.sum())
    with pytest.raises(UnsupportedModelError):
        Source(Memory(model)).lower()
    assert all(m.training for m in model.modules())


def test_generation_defaults_that_transformers_would_not_save_are_kept(tmp_path: Path) -> None:
    _, model = build("llama")
    model.generation_config.temperature = 0.6
    model.config.temperature = 0.7  # this, too, transformers refuses to save
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    Source(Memory(model)).save_side_files(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == model.config.hidden_size


@pytest.mark.parametrize("thing", [None, 5, "m", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_told(thing: Any) -> None:
    with pytest.raises(ModelLoadError, match="is not a transformers model: use from_pretrained"):
        QEFFAutoModelForCausalLM(thing)


@pytest.mark.parametrize("name", [None, 5, b"m", "a\0b", "n" * 300, "x" * 5000, "./\0"])
def test_names_that_no_folder_can_have_are_told(name: Any) -> None:
    with pytest.raises(ModelLoadError) as error:
        find_folder(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_architecture_does_not_choose_where_a_package_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    source = open_source(model)
    source.config.architectures = ["../../OUTSIDE"]
    with pytest.raises(ModelLoadError, match="which is not a plain name"):
        compile_model(source, CompileOptions(prefill_seq_len=4, ctx_len=8), target="onnxruntime")
    assert not list(tmp_path.rglob("*OUTSIDE*"))


# Arguments of `from_pretrained`.


@pytest.mark.parametrize(
    "arguments",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu")},
        {"use_cache": True},
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"torch_dtype": "float32"},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
        {"output_hidden_states": False},
        {"variant": None},
        {"subfolder": ""},
        {"experts_implementation": "eager"},
    ],
    ids=str,
)
def test_what_happens_anyway_may_be_asked_for(arguments: dict[str, Any]) -> None:
    assert hub_arguments({**arguments, "revision": "main"}) == {"revision": "main"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"device_map": "cuda"},
        {"device_map": "auto"},
        {"use_cache": False},
        {"dtype": torch.bfloat16},
        {"dtype": "float16"},
        {"use_safetensors": False},
        {"output_hidden_states": True},
        {"variant": "fp16"},
        {"subfolder": "inner"},
        {"load_in_8bit": True},
        {"quantization_config": {"load_in_4bit": True}},
        {"ignore_mismatched_sizes": True},
        {"key_mapping": {"a": "b"}},
        {"gguf_file": "x.gguf"},
        {"unheard_of": None},
    ],
    ids=str,
)
def test_what_does_not_happen_is_refused_by_name(arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    with pytest.raises(ModelLoadError, match=f"from_pretrained does not support {name}="):
        hub_arguments(arguments)


def test_a_base_model_is_a_model(saved: Path) -> None:
    """The doors above are not closed to what is right."""
    assert isinstance(ForwardSource(Folder(saved), ForwardOptions(EMBEDDING)).reference(), PreTrainedModel)
