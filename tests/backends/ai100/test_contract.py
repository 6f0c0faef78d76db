"""Kill tests: each damages an emitted folder in one way, and must be found by its own code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from backends.ai100 import contract, emit, sdk
from backends.ai100.options import Ai100Options
from qeff_ir.errors import CompileError
from qeff_ir.ir.snapshot import load_module

from .conftest import OPTIONS, Tiny

MODEL = "MistralForCausalLM.onnx"


def codes(folder: Path) -> set[str]:
    return {v.code for v in contract.violations(folder)}


def edit_model(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    (file,) = folder.glob("*.onnx")
    model = onnx.load(str(file), load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())


def edit_json(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def test_an_emitted_folder_is_clean(folder: Path) -> None:
    assert list(contract.violations(folder)) == []
    onnx.checker.check_model(str(folder / MODEL), full_check=True)


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if n == old else n for n in node.input]
        node.output[:] = [new if n == old else n for n in node.output]


def _io(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    return next(v for v in (*model.graph.input, *model.graph.output) if v.name == name)


def _set_type(name: str, kind: int) -> Callable[[onnx.ModelProto], None]:
    return lambda m: setattr(_io(m, name).type.tensor_type, "elem_type", kind)


def _set_dim(name: str, axis: int, symbol: str) -> Callable[[onnx.ModelProto], None]:
    return lambda m: setattr(_io(m, name).type.tensor_type.shape.dim[axis], "dim_param", symbol)


def _swap_inputs(model: onnx.ModelProto) -> None:
    first, second = onnx.ValueInfoProto(), onnx.ValueInfoProto()
    first.CopyFrom(model.graph.input[2])
    second.CopyFrom(model.graph.input[3])
    model.graph.input[2].CopyFrom(second)
    model.graph.input[3].CopyFrom(first)


def _add_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch_size", "seq_len"])
    )


def _add_node(op: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    return lambda m: m.graph.node.append(helper.make_node(op, ["input_ids"], ["unused"], domain=domain))


def _set_external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        next(e for e in tensor.external_data if e.key == key).value = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: _rename(m, "past_key.1_RetainedState", "past_key.1_Retained"),
            {"state-pair", "outputs", "custom-io"},
        ),
        (lambda m: _rename(m, "past_key.1", "old_key.1"), {"state-pair", "inputs"}),
        (lambda m: _rename(m, "logits", "scores"), {"outputs"}),
        (_swap_inputs, {"inputs"}),
        (_add_output, {"outputs"}),
        (_set_type("input_ids", TensorProto.INT32), {"dtype-shape"}),
        (_set_type("logits", TensorProto.FLOAT16), {"dtype-shape"}),
        (_set_type("past_value.0", TensorProto.FLOAT16), {"state-pair"}),
        (_set_dim("position_ids", 1, "tokens"), {"dtype-shape", "symbol"}),
        (_set_dim("logits", 1, "seq_len"), {"dtype-shape"}),
        (_set_dim("past_key.0", 2, "other_len"), {"state-pair", "symbol"}),
        (_add_node("NonZero"), {"op"}),
        (_add_node("SequenceConstruct"), {"op"}),
        (_add_node("CtxRoll", "com.qualcomm.cloud"), {"op"}),
        (lambda m: m.functions.pop(), {"function"}),
        (lambda m: setattr(next(o for o in m.opset_import if o.domain == ""), "version", 21), {"opset"}),
        (_set_external("location", "../weights.data"), {"external-data"}),
        (_set_external("location", "/etc/passwd"), {"external-data"}),
        (_set_external("length", "8"), {"external-data"}),
    ],
)
def test_a_damaged_graph_is_found(folder: Path, change: Callable[[onnx.ModelProto], None], expected: set[str]) -> None:
    edit_model(folder, change)
    assert codes(folder) == expected


def _first_last(model: onnx.ModelProto) -> None:
    first = model.graph.input.pop(0)
    model.graph.input.append(first)


def test_an_emitted_forward_pass_is_clean(forward: Path) -> None:
    assert list(contract.violations(forward)) == []
    assert not (forward / "custom_io.yaml").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set_type("input_ids", TensorProto.INT32), {"dtype-shape"}),
        (_set_type("attention_mask", TensorProto.FLOAT), {"dtype-shape"}),
        (_set_dim("input_ids", 0, "rows"), {"dtype-shape", "symbol"}),
        (_set_dim("attention_mask", 1, "tokens"), {"dtype-shape", "symbol"}),
        (_set_dim("output", 0, "rows"), {"symbol"}),
        (_first_last, {"inputs"}),
        (lambda m: _rename(m, "attention_mask", "mask"), {"inputs"}),
        (lambda m: m.graph.output.pop(), {"outputs"}),
        (  # makes a decoder of it, with states and a file that lists them
            lambda m: _rename(m, "output", "output_RetainedState"),
            {"inputs", "outputs", "state-pair", "dtype-shape", "file"},
        ),
        (_add_node("NonZero"), {"op"}),
        (_set_external("length", "8"), {"external-data"}),
    ],
)
def test_a_damaged_forward_pass_is_found(
    forward: Path, change: Callable[[onnx.ModelProto], None], expected: set[str]
) -> None:
    edit_model(forward, change)
    assert codes(forward) == expected


def test_a_batch_axis_is_wanted_of_every_input(forward: Path) -> None:
    """Of those that are no tokens too: of pixels, say."""
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [2, 3, 16, 16])
    edit_model(forward, lambda m: m.graph.input.append(value))
    found = list(contract.violations(forward))
    assert [(v.code, v.message) for v in found] == [
        ("dtype-shape", "pixel_values is [2, 3, 16, 16], not [batch_size, ...]")
    ]


@pytest.mark.parametrize("flag", ["-aic-hw-version=ai100", "-network-specialization-config=specializations.json"])
def test_a_damaged_command_of_a_forward_pass_is_found(forward: Path, flag: str) -> None:
    edit_json(forward, "compile_command.json", lambda d: d["argv"].remove(flag))
    assert codes(forward) == {"command"}


def _embeds(kind: int, *dims: str | int) -> Callable[[onnx.ModelProto], None]:
    """Let the host look up the tokens, with an input of that type and shape."""

    def change(model: onnx.ModelProto) -> None:
        _rename(model, "input_ids", "inputs_embeds")
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("inputs_embeds", kind, dims))

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_embeds(TensorProto.FLOAT, "batch_size", "seq_len", 32), set[str]()),
        (_embeds(TensorProto.INT64, "batch_size", "seq_len", 32), {"dtype-shape"}),
        (_embeds(TensorProto.FLOAT, "batch_size", "seq_len"), {"dtype-shape"}),
        (_embeds(TensorProto.FLOAT, "batch_size", 8, 32), {"dtype-shape"}),
    ],
)
def test_token_embeddings_of_the_host(
    folder: Path, change: Callable[[onnx.ModelProto], None], expected: set[str]
) -> None:
    edit_model(folder, change)
    assert codes(folder) == expected


def test_a_cut_weight_file_is_found(folder: Path) -> None:
    file = max((folder / "weights").iterdir(), key=lambda p: p.stat().st_size)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    assert codes(folder) == {"external-data"}


def test_a_missing_weight_file_is_found(folder: Path) -> None:
    for file in (folder / "weights").iterdir():
        file.unlink()
    assert codes(folder) == {"external-data"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["specializations"][1]["symbols"].pop("sliding_window"), {"symbol"}),
        (lambda d: d["specializations"][0]["symbols"].pop("seq_len"), {"symbol"}),
        (lambda d: d["specializations"].clear(), {"specializations-form"}),
        (lambda d: d["specializations"][0]["symbols"].update(seq_len=8), {"specializations-form"}),
        (lambda d: d["specializations"][0]["symbols"].update(seq_len="0"), {"specializations-form"}),
        (lambda d: d["specializations"].__setitem__(0, d["specializations"][0]["symbols"]), {"specializations-form"}),
        (lambda d: d["specializations"].append(d["specializations"][0]), {"duplicate-specialization"}),
        (lambda d: d["specializations"][1].update(name="Prefill"), {"duplicate-specialization"}),
    ],
)
def test_damaged_specializations_are_found(folder: Path, change: Callable[[Any], None], expected: set[str]) -> None:
    edit_json(folder, "specializations.json", change)
    assert codes(folder) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" - IOName: past_key.0\n   Precision: float16\n\n", ""),
        ("past_value.1_RetainedState", "past_value.7_RetainedState"),
        ("float16", "float32"),
        ("past_key.0\n   Precision: float16", "past_key.0\n   Precision: mxint8"),
        ("   Precision", "  Precision"),
    ],
)
def test_a_damaged_custom_io_is_found(folder: Path, old: str, new: str) -> None:
    text = (folder / "custom_io.yaml").read_text()
    assert old in text
    (folder / "custom_io.yaml").write_text(text.replace(old, new))
    assert codes(folder) == {"custom-io"}


@pytest.mark.parametrize("precision", ["float16", "mxint8"])
def test_a_tensor_that_custom_io_lists_twice_is_found(folder: Path, precision: str) -> None:
    """Also in one precision: the compiler counts entries."""
    path = folder / "custom_io.yaml"
    path.write_text(path.read_text() + f" - IOName: past_key.0\n   Precision: {precision}\n\n")
    assert codes(folder) == {"custom-io"}


def test_an_adapter_of_another_precision_is_found(adapted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapted, tmp_path / "package"))
    assert codes(folder) == set()
    entries = (folder / "custom_io.yaml").read_text().split(" - ")
    assert "lora_b" in entries[-1]
    entries[-1] = entries[-1].replace("float16", "mxint8")
    (folder / "custom_io.yaml").write_text(" - ".join(entries))
    assert codes(folder) == {"custom-io"}


def test_a_compressed_cache_leaves_adapters_as_they_are(tiny: Tiny, adapted: Path) -> None:
    (file,) = adapted.glob("*.onnx")
    adapters = load_module(file).adapters
    text = emit.custom_io([*tiny.module.residents, *adapters], "mxint8")
    found = dict(re.findall(r"IOName: (\S+)\n   Precision: (\S+)", text))
    assert {found.pop(name) for item in adapters for name in item.names} == {"float16"}
    assert set(found.values()) == {"mxint8"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-aic-hw", "-hw"),
        ("-retained-state", "-time-passes"),
        (f"-m={MODEL}", "-m=/abs/model.onnx"),
        ("-aic-binary-dir=qpc", "-aic-binary-dir=/tmp/qpc"),
        ("-custom-IO-list-file=custom_io.yaml", "-custom-IO-list-file=io.yaml"),
        ("-aic-hw-version=ai100", "-aic-hw-version=2.0"),
    ],
)
def test_a_damaged_command_is_found(folder: Path, old: str, new: str) -> None:
    edit_json(folder, "compile_command.json", lambda d: d["argv"].__setitem__(d["argv"].index(old), new))
    assert codes(folder) == {"command"}


@pytest.mark.parametrize("name", [MODEL, "custom_io.yaml", "specializations.json", "compile_command.json"])
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert codes(folder) == {"file"}


def test_an_unreadable_model_is_found(folder: Path) -> None:
    (folder / MODEL).write_bytes(b"not a protobuf")
    assert codes(folder) == {"onnx"}


def test_check_raises_the_first_with_its_code(folder: Path) -> None:
    (folder / "custom_io.yaml").unlink()
    with pytest.raises(CompileError, match=r"^\[file\] .* has no custom_io\.yaml: emit the package again$"):
        contract.check(folder)


def test_the_command_is_the_contract_to_the_letter(tiny: Tiny, tmp_path: Path) -> None:
    options = Ai100Options(
        prefill_seq_len=8, ctx_len=40, batch_size=2, num_devices=2, mxfp6_matmul=True, mxint8_kv_cache=True,
        flags={"mos": 1, "sub_functions": True},
    )  # fmt: skip
    emit.emit(tiny.module, tmp_path, options, sdk.description("1.22"), "ai100")
    assert list(contract.violations(tmp_path)) == []
    assert json.loads((tmp_path / "compile_command.json").read_text())["argv"] == [
        "qaic-compile", "-aic-hw", "-aic-hw-version=ai100", f"-m={MODEL}", "-mdp-load-partition-config=mdp_ts_2.json",
        "-retained-state", "-convert-to-fp16", "-aic-num-cores=16", "-mxfp6-matmul", "-mos=1", "-sub-functions",
        "-network-specialization-config=specializations.json", "-custom-IO-list-file=custom_io.yaml",
        "-aic-binary-dir=qpc",
    ]  # fmt: skip
    assert json.loads((tmp_path / "mdp_ts_2.json").read_text()) == {
        "connections": [{"devices": [0, 1], "type": "p2p"}],
        "partitions": [
            {"name": "Partition0", "devices": [{"deviceId": 0, "numCores": 16}, {"deviceId": 1, "numCores": 16}]}
        ],
    }
    text = (tmp_path / "custom_io.yaml").read_text()
    names = ("past_key.0", "past_key.0_RetainedState")
    assert text.startswith("".join(f" - IOName: {name}\n   Precision: mxint8\n\n" for name in names))


def test_both_forms_of_specializations(tiny: Tiny, tmp_path: Path) -> None:
    sizes = {"batch_size": "2", "ctx_len": "40", "seq_len": "8", "sliding_window": "13"}
    for version, expected in (("1.22", {"name": "Prefill", "symbols": sizes}), ("1.20", sizes)):
        emit.emit(tiny.module, tmp_path / version, OPTIONS, sdk.description(version), "ai100")
        text = (tmp_path / version / "specializations.json").read_text()
        assert json.loads(text)["specializations"][0] == expected
        assert text.startswith('{\n    "specializations": [\n        {\n')
        assert list(contract.violations(tmp_path / version)) == []


def test_an_emitted_folder_is_the_same_wherever_it_is_written(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("here", "there/deeper"):
        emit.emit(tiny.module, tmp_path / name, OPTIONS, sdk.description("1.22"), "ai100")
    first, second = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "here", tmp_path / "there/deeper")
    )
    assert len(first) >= 5 and first == second


@pytest.mark.parametrize(
    ("name", "kind", "dims", "at", "expected"),
    [
        ("comp_ctx_lengths", TensorProto.INT64, ["comp_ctx_lengths"], None, set[str]()),
        ("comp_ctx_lengths", TensorProto.INT64, ["comp_ctx_lengths"], 2, {"inputs"}),
        ("comp_ctx_lengths", TensorProto.INT32, ["comp_ctx_lengths"], None, {"dtype-shape"}),
        ("comp_ctx_lengths", TensorProto.INT64, ["comp_ctx_lengths", 1], None, {"dtype-shape"}),
        ("num_logits_to_keep", TensorProto.INT64, ["num_logits_to_keep", 1], None, {"dtype-shape"}),  # of one token
        (
            "batch_index",
            TensorProto.INT64,
            ["batch_size", 1],
            None,
            {"dtype-shape", "cache-rows"},
        ),  # states have no rows of their own
    ],
)
def test_inputs_of_a_run_behind_the_states(
    folder: Path, name: str, kind: int, dims: list[str | int], at: int | None, expected: set[str]
) -> None:
    value = helper.make_tensor_value_info(name, kind, dims)
    edit_model(folder, lambda m: m.graph.input.insert(len(m.graph.input) if at is None else at, value))
    sizes = {"comp_ctx_lengths": "4", "num_logits_to_keep": "1"}
    edit_json(folder, "specializations.json", lambda d: [s["symbols"].update(sizes) for s in d["specializations"]])
    assert codes(folder) == expected


@pytest.mark.parametrize("size", [("comp_ctx_lengths", "41"), ("num_logits_to_keep", "9")])
def test_sizes_of_a_run_beyond_what_it_has(folder: Path, size: tuple[str, str]) -> None:
    edit_json(folder, "specializations.json", lambda d: d["specializations"][0]["symbols"].update([size]))
    assert codes(folder) == {"run-sizes"}


def _prefixed(model: onnx.ModelProto, names: list[str]) -> None:
    for name in names:
        _rename(model, name, f"{name}_host1")
        _rename(model, f"{name}_RetainedState", f"{name}_host1_RetainedState")


def test_states_have_one_prefix(folder: Path) -> None:
    states = [f"past_{what}.{layer}" for layer in range(2) for what in ("key", "value")]
    edit_model(folder, lambda m: _prefixed(m, states[:2]))
    assert "inputs" in codes(folder)
    assert any("the states have the prefixes host1, none" in v.message for v in contract.violations(folder))
    edit_model(folder, lambda m: _prefixed(m, states[2:]))
    assert codes(folder) == {"custom-io"}  # which lists the names from before
