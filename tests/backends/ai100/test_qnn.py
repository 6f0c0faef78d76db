"""Compiling through QNN: files, commands and checks, driven with a stand-in for the SDK's two tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from backends.ai100.backend import BACKEND
from backends.ai100.contract import violations
from backends.ai100.device import _device_count
from backends.ai100.emit import COMMAND, CUSTOM_IO
from backends.ai100.qnn import files as qnn
from qeff_ir import QEFFAutoModelForCausalLM, QEFFAutoModelForImageTextToText
from qeff_ir.errors import CompileError
from qeff_ir.package import program_folder
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.target_options import read_options
from tests import multimodal, support
from tests import test_image_text as image_text

from .conftest import OPTIONS, Tiny

QNN = replace(OPTIONS, enable_qnn=True)
MODELS = ["llama", "mixtral", "gemma", "granite"]

STAND_IN = """
import json, sys
from pathlib import Path
from backends.ai100.contract import violations

given = dict(zip(sys.argv[1::1], sys.argv[2::1]))
if Path(sys.argv[0]).name == "qairt-converter":
    Path("model.dlc").write_bytes(Path(given["--input_network"]).read_bytes())
else:
    library = json.loads(Path(given["--config_file"]).read_text())["backend_extensions"]["shared_library_path"]
    missing = [path for path in (library, given["--backend"], given["--dlc_path"]) if not Path(path).is_file()]
    if missing:
        sys.exit(f"no such file: {missing[0]}")
    Path(given["--output_dir"]).mkdir()
    (Path(given["--output_dir"]) / given["--backend_binary"]).write_bytes(b"stand-in")
print("done", Path(sys.argv[0]).name)
"""


def tiny_of(model_type: str) -> PreTrainedModel:
    """A tiny random model, seeded."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads)).eval()


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An SDK whose tools do what they are told, if all files are where the commands say."""
    root = tmp_path / "qnn sdk"
    tools, libraries = root / "bin" / qnn.PLATFORM, root / "lib" / qnn.PLATFORM
    tools.mkdir(parents=True)
    libraries.mkdir(parents=True)
    for name in ("libQnnAic.so", "libQnnAicNetRunExtensions.so"):
        (libraries / name).touch()
    here = Path(__file__).parents[3]
    for name in ("qairt-converter", "qnn-context-binary-generator"):
        script = tmp_path / f"{name}.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(here)!r})\nsys.argv[0] = {name!r}\n{STAND_IN}")
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv(qnn.ROOT_VARIABLE, str(root))
    return root


@pytest.fixture
def emitted(tiny: Tiny, tmp_path: Path) -> Path:
    BACKEND.emit(tiny.module, tmp_path / "package", QNN)
    return tmp_path / "package"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_compiled_and_runs(name: str, sdk: Path, tmp_path: Path) -> None:
    model = tiny_of(name)
    ours = QEFFAutoModelForCausalLM(model)
    made = ours.compile(
        target="ai100", enable_qnn=True, prefill_seq_len=8, ctx_len=40, batch_size=2, compile_dir=tmp_path / "package"
    )
    package = tmp_path / "package"
    assert made == str(package / "qpc") and (package / "qpc" / "programqpc.bin").read_bytes() == b"stand-in"
    assert (package / "converter_stdout.txt").read_text() == "done qairt-converter\n"
    assert not (package / qnn.CONVERTED).exists()  # the weights are not there twice
    assert str(sdk) not in (package / qnn.EXTENSIONS).read_text() and str(sdk) not in (package / COMMAND).read_text()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    answer = Decoder(BACKEND.open(package, threads=1)).prefill(prompts)
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0, -1].numpy() for ids in prompts]
    np.testing.assert_allclose(answer, expected, atol=1e-5)


@pytest.mark.parametrize("kv_offload", [True, False])
def test_pictures_and_text_are_compiled_and_run(kv_offload: bool, sdk: Path, tmp_path: Path) -> None:
    """Each program by itself."""
    name = "llava"
    ours = QEFFAutoModelForImageTextToText(multimodal.lively(name), image_text.processor(name), kv_offload=kv_offload)
    shapes: dict[str, Any] = {**image_text.SHAPES, "image_size": image_text.PROCESSORS[name].size}
    ours.compile(target="ai100", enable_qnn=True, compile_dir=tmp_path / "package", **shapes)
    programs = ours.package.manifest.programs
    assert len(programs) == 1 + kv_offload
    for program in programs:
        folder = program_folder(tmp_path / "package", program)
        assert (folder / "qpc" / "programqpc.bin").read_bytes() == b"stand-in" and not list(violations(folder))
    text, images = image_text.texts(name), [image_text.pictures(name, [1, 2]), image_text.pictures(name, [3])]
    right = [image_text.expected(name, own, said) for own, said in zip(images, text, strict=True)]
    assert image_text.answered(ours, **image_text.processed(name, images, text)) == right


def test_the_files_are_spelled_out(tiny: Tiny, emitted: Path) -> None:
    assert not list(violations(emitted))
    described = yaml.safe_load((emitted / qnn.IO_CONFIG).read_text())
    inputs = {e["Name"]: e["Desired Model Parameters"] for e in described["Input Tensor Configuration"]}
    outputs = {e["Name"]: e["Desired Model Parameters"] for e in described["Output Tensor Configuration"]}
    assert inputs["input_ids"] == {"DataType": "int64", "Shape": "(2, 8), (2, 1)"}
    past = next(s for s in tiny.module.states)
    assert inputs[past.input]["DataType"] == outputs[past.output]["DataType"] == "float16"
    assert inputs[past.input]["Shape"].count("(") == 1  # the same for both
    assert outputs["logits"] == {"DataType": "float32"}
    settings = json.loads((emitted / qnn.AIC_SETTINGS).read_text())
    assert settings["graph_names"] == ["model_configuration_1", "model_configuration_2"]
    assert settings["compiler_num_of_cores"] == 16 and settings["compiler_retained_state"] is True
    convert, generate = json.loads((emitted / COMMAND).read_text())["commands"]
    assert convert[0] == "$QNN_SDK_ROOT/bin/x86_64-linux-clang/qairt-converter"
    assert generate[generate.index("--dlc_path") + 1] == convert[convert.index("--output_path") + 1] == "model.dlc"
    assert not (emitted / CUSTOM_IO).exists()  # the other compiler's
    assert not (emitted / qnn.FORMATS).exists() and not (emitted / qnn.PARTITION).exists()
    assert _device_count(emitted) == 1


def test_options_reach_the_settings(tiny: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "converter_args_extension": "--onnx_batch 1 'a b'",
                "context_binary_generator_args_extension": "--log_level verbose",
                "qnn_compilation_backend": {"compiler_stat_level": 70, "compiler_own": True},
                "SKIP_QNN_CONVERTER_STEP": False,
            }
        )
    )
    flags = {"mos": 4, "aic_enable_depth_first": True}
    own = {"num_devices": 4, "num_cores": 14, "mxfp6_matmul": True, "mxint8_kv_cache": True, "flags": flags}
    options = replace(QNN, qnn_config=str(config), **own)
    BACKEND.check_options(options)
    BACKEND.emit(tiny.module, tmp_path / "package", options)
    settings = json.loads((tmp_path / "package" / qnn.AIC_SETTINGS).read_text())
    wanted = {
        "compiler_stat_level": 70, "compiler_own": True, "compiler_max_out_channel_split": "4",
        "compiler_enable_depth_first": True, "compiler_mxfp6_matmul_weights": True, "compiler_num_of_cores": 14,
        "compiler_mdp_load_partition_config": "tensor_slicing.json",
    }  # fmt: skip
    assert settings | wanted == settings
    convert, generate = json.loads((tmp_path / "package" / COMMAND).read_text())["commands"]
    assert convert[-3:] == ["--onnx_batch", "1", "a b"] and generate[-2:] == ["--log_level", "verbose"]
    formats = json.loads((tmp_path / "package" / qnn.FORMATS).read_text())["graphs"]
    assert [g["graph_name"] for g in formats] == settings["graph_names"]
    assert {t["tensor_name"] for t in formats[1]["tensors"]} == {
        name for s in tiny.module.states for name in (s.input, s.output)
    }
    devices = json.loads((tmp_path / "package" / qnn.PARTITION).read_text())["partitions"][0]["devices"]
    assert devices == [{"deviceId": d} for d in range(4)] and _device_count(tmp_path / "package") == 4


def test_only_keys_and_values_are_compressed(tmp_path: Path) -> None:
    module = support.canonical("qwen3-next")
    run_pipeline(module, Pipeline.parse(support.rest_of("ai100")))
    BACKEND.emit(module, tmp_path, replace(QNN, mxint8_kv_cache=True))
    described = yaml.safe_load((tmp_path / qnn.IO_CONFIG).read_text())
    types = {e["Name"]: e["Desired Model Parameters"]["DataType"] for e in described["Input Tensor Configuration"]}
    found = {s.kind: types[s.input] for s in module.states}
    assert found == {"key": "uint8", "value": "uint8", "conv": "float16", "recurrent": "float16"}
    edit(
        qnn.IO_CONFIG,
        lambda d: [
            e["Desired Model Parameters"].update(DataType="uint8")
            for k in d
            for e in d[k]
            if e["Name"].startswith("conv_state")
        ],
        tmp_path,
    )
    assert "qnn-io" in {v.code for v in violations(tmp_path)}


def test_adapters_are_not_compressed(tmp_path: Path) -> None:
    module = support.canonical("llama")
    step = 'lora{mode=slots n=2 rank=2 targets="q_proj" retained=true}'
    run_pipeline(module, Pipeline.parse(support.rest_of("ai100")).add(step))
    BACKEND.emit(module, tmp_path, replace(QNN, mxint8_kv_cache=True))
    described = yaml.safe_load((tmp_path / qnn.IO_CONFIG).read_text())
    types = {e["Name"]: e["Desired Model Parameters"]["DataType"] for e in described["Output Tensor Configuration"]}
    assert len(module.adapters) == 4 and {types[a.output] for a in module.adapters} == {"float16"}
    assert {types[s.output] for s in module.states} == {"uint8"} and not list(violations(tmp_path))


def test_a_users_partition_is_used(tiny: Tiny, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"partitions": [{"devices": [{"deviceId": 0}, {"deviceId": 3}]}]}))
    flags = {"mdp_load_partition_config": str(mine)}
    BACKEND.emit(tiny.module, tmp_path / "package", replace(QNN, num_devices=2, flags=flags))
    assert not (tmp_path / "package" / qnn.PARTITION).exists() and _device_count(tmp_path / "package") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enable_qnn": 1}, "enable_qnn must be True or False, not 1"),
        ({"qnn_config": "x.json"}, "qnn_config is for QNN: give enable_qnn=True too"),
        (
            {"enable_qnn": True, "user_tiled": True},
            "QNN has no setting for user_tiled: it takes aic_",
        ),
        ({"enable_qnn": True, "mos": "4"}, "the flag mos takes a whole number, not '4'"),
        ({"enable_qnn": True, "mos": True}, "the flag mos takes a whole number, not True"),
        ({"enable_qnn": True, "qnn_config": "absent.json"}, "qnn_config is 'absent.json': give the path"),
        ({"enable_qnn": True, "mdp_load_partition_config": "absent.json"}, "takes the path of an existing file"),
    ],
)
def test_wrong_flags_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message.replace("'", ".")):
        BACKEND.check_options(read_options(BACKEND, flags))


def test_weights_must_be_in_the_model() -> None:
    with pytest.raises(CompileError, match="leave out weight_free, or enable_qnn"):
        BACKEND.check_options(replace(QNN, weight_free=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is no configuration of QNN"),
        ({"converter": ""}, "is no configuration of QNN"),
        ({"qnn_compilation_backend": []}, "qnn_compilation_backend in .* is no JSON object"),
        ({"SKIP_QNN_CONVERTER_STEP": "true"}, "a package is always made anew"),
        ({"converter_args_extension": "--config=x"}, "has --config=x, which follows from the model"),
        ({"context_binary_generator_args_extension": "--backend x"}, "has --backend, which follows from the model"),
        ({"qnn_compilation_backend": {"graph_names": ["model"]}}, "has graph_names, which follows from the rest"),
        ({"converter_args_extension": "'a"}, "give the arguments as one text"),
        ({"converter_args_extension": ["a"]}, "give the arguments as one text"),
    ],
)
def test_a_wrong_configuration_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CompileError, match=message):
        BACKEND.check_options(replace(QNN, qnn_config=str(path)))


def test_more_than_two_specializations_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    module = tiny.module.clone()
    module.specializations = [replace(s, name=f"{s.name}{i}") for i in range(2) for s in module.specializations]
    with pytest.raises(CompileError, match="QNN takes two specializations, not 4"):
        BACKEND.emit(module, tmp_path / "package", QNN)


def test_without_an_sdk_it_is_said_where_one_is_looked_for(
    emitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(qnn.ROOT_VARIABLE, raising=False)
    assert "$QNN_SDK_ROOT is not set" in str(BACKEND.missing(QNN))
    monkeypatch.setenv(qnn.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(CompileError, match=r"has no .*/bin/x86_64-linux-clang/qairt-converter: correct it"):
        BACKEND.compile(emitted, QNN)


def test_an_sdk_may_be_named_from_where_the_user_is(emitted: Path, sdk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sdk.parent)
    monkeypatch.setenv(qnn.ROOT_VARIABLE, sdk.name)
    before = BACKEND.versions()["qnn"]
    BACKEND.compile(emitted, QNN)
    (sdk / "bin" / qnn.PLATFORM / "qairt-converter").write_text("#!/bin/sh\nexit 0 # of a newer SDK\n")
    assert BACKEND.versions()["qnn"] != before


def test_a_tool_that_fails_is_told(emitted: Path, sdk: Path) -> None:
    (sdk / "lib" / qnn.PLATFORM / "libQnnAic.so").unlink()
    with pytest.raises(CompileError, match=r"qnn-context-binary-generator.* failed with exit code 1: no such file: .*"):
        BACKEND.compile(emitted, QNN)
    assert not (emitted / qnn.CONVERTED).exists() and "$QNN_SDK_ROOT" in (emitted / qnn.EXTENSIONS).read_text()


def edit(name: str, change: Callable[[Any], object], folder: Path) -> None:
    path = folder / name
    text = path.read_text()
    data = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    change(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False) if path.suffix == ".yaml" else json.dumps(data))


FAULTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "another tool": (COMMAND, lambda d: d["commands"][0].__setitem__(0, "qnn-onnx-converter"), "qnn-command"),
    "one command": (COMMAND, lambda d: d["commands"].pop(), "qnn-command"),
    "another model": (COMMAND, lambda d: d["commands"][0].__setitem__(2, "other.onnx"), "qnn-command"),
    "types are not kept": (COMMAND, lambda d: d["commands"][0].remove("--preserve_io_datatype"), "qnn-command"),
    "twice": (COMMAND, lambda d: d["commands"][1].extend(["--output_dir", "qpc"]), "qnn-command"),
    "another binary": (COMMAND, lambda d: d["commands"][1].__setitem__(4, "other.bin"), "qnn-command"),
    "a setting is gone": (qnn.AIC_SETTINGS, lambda d: d.pop("compiler_num_of_cores"), "qnn-settings"),
    "one graph": (qnn.AIC_SETTINGS, lambda d: d.update(graph_names=["model"]), "qnn-settings"),
    "nothing is retained": (qnn.AIC_SETTINGS, lambda d: d.update(compiler_retained_state=False), "qnn-settings"),
    "no partition": (
        qnn.AIC_SETTINGS, lambda d: d.update(compiler_mdp_load_partition_config="x.json"), "qnn-settings",
    ),
    "another library": (qnn.EXTENSIONS, lambda d: d["backend_extensions"].update(shared_library_path="/x"), "qnn-ext"),
    "a tensor is gone": (qnn.IO_CONFIG, lambda d: d["Input Tensor Configuration"].pop(), "qnn-io"),
    "no outputs": (qnn.IO_CONFIG, lambda d: d.pop("Output Tensor Configuration"), "qnn-io"),
    "another type": (
        qnn.IO_CONFIG,
        lambda d: d["Input Tensor Configuration"][0]["Desired Model Parameters"].update(DataType="int32"),
        "qnn-io",
    ),
    "another shape": (
        qnn.IO_CONFIG,
        lambda d: d["Input Tensor Configuration"][0]["Desired Model Parameters"].update(Shape="(2, 1), (2, 8)"),
        "qnn-io",
    ),
    "one cache is MXINT8": (
        qnn.IO_CONFIG,
        lambda d: d["Input Tensor Configuration"][2]["Desired Model Parameters"].update(DataType="uint8"),
        "qnn-io",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_breaks_the_contract_is_told(fault: str, emitted: Path) -> None:
    name, change, code = FAULTS[fault]
    edit(name, change, emitted)
    assert next(v.code for v in violations(emitted)).startswith(code)


def test_a_list_of_formats_that_lacks_a_cache_is_told(tiny: Tiny, tmp_path: Path) -> None:
    options = replace(QNN, mxint8_kv_cache=True)
    BACKEND.emit(tiny.module, tmp_path / "package", options)
    edit(qnn.FORMATS, lambda d: d["graphs"][1]["tensors"].pop(), tmp_path / "package")
    assert [v.code for v in violations(tmp_path / "package")] == ["qnn-formats"]


def test_one_length_is_one_graph(tiny: Tiny, tmp_path: Path) -> None:
    module = tiny.module.clone()
    module.specializations = module.specializations[1:]
    BACKEND.emit(module, tmp_path / "package", replace(QNN, prefill_seq_len=1))
    assert json.loads((tmp_path / "package" / qnn.AIC_SETTINGS).read_text())["graph_names"] == ["model"]
    assert not list(violations(tmp_path / "package"))
