"""A package without weights: they are found in safetensors files, and answer as they do in a graph that has them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.parser
import onnx_ir as ir
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from backends.ai100 import contract, weight_free
from backends.ai100.backend import BACKEND
from backends.ai100.options import Ai100Options
from qeff_ir import QEFFAutoModel, QEFFAutoModelForCausalLM, numerics
from qeff_ir.cli.app import app
from qeff_ir.errors import PackageError
from qeff_ir.frontend.source import open_source
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.ranges import file_range
from qeff_ir.runtime.decoder import Decoder
from qeff_ir.testing.trace import compare, session_trace
from tests import support
from tests.encoders import build

from .test_contract import codes, edit_model

NAME = (
    "mixtral"  # the checkpoint has its experts one by one, the graph stacked: some weights are in no file as they stand
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weight-free")
    support.tiny(NAME)[1].save_pretrained(folder / "model")
    model = QEFFAutoModelForCausalLM.from_pretrained(folder / "model")
    options: dict[str, Any] = {"batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48}
    model.compile(target="ai100", emit_only=True, weight_free=True, compile_dir=folder / "package", **options)
    return folder / "package"


def test_a_tensor_under_two_names_is_written_once(tmp_path: Path) -> None:
    table = ir.tensor(np.arange(600, dtype=np.float32).reshape(20, 30))
    text = """<ir_version: 8, opset_import: ["" : 18]> tied (int64[n] ids, float[20, 30] embed, float[20, 30] head)
        => (float[n, 20] out) { rows = Gather(embed, ids) t = Transpose(head) out = MatMul(rows, t) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    for value in list(model.graph.inputs)[1:]:
        value.const_value, value.metadata_props[WEIGHT_KEY] = table, f"{value.name}.weight"
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    weight_free.save(model, tmp_path, "tied.onnx", "Tied")
    with safe_open(tmp_path / weight_free.PREPARED, framework="np") as file:
        assert list(file.keys()) == ["embed"]
        np.testing.assert_array_equal(file.get_tensor("embed"), table.numpy())
    spec = weight_free.specification(proto_of(tmp_path))
    assert spec is not None
    assert [(i["name"], i["location"]["key"]) for i in spec["inputs"]] == [("embed", "embed"), ("head", "embed")]


@pytest.fixture
def damaged(package: Path, tmp_path: Path) -> Path:
    """A copy of the package that a test may damage."""
    import shutil

    return Path(shutil.copytree(package, tmp_path / "package"))


def proto_of(folder: Path) -> onnx.ModelProto:
    (file,) = folder.glob("*.onnx")
    return onnx.load(str(file), load_external_data=False)


def edit_spec(folder: Path, change: Callable[[Any], object]) -> None:
    """Change what the metadata and the sidecar say, both alike."""

    def edit(model: onnx.ModelProto) -> None:
        (entry,) = (p for p in model.metadata_props if p.key == weight_free.METADATA)
        data = json.loads(entry.value)
        change(data)
        entry.value = json.dumps(data, sort_keys=True, separators=(",", ":"))
        (folder / weight_free.SPEC).write_text(entry.value)

    edit_model(folder, edit)


def test_it_answers_as_transformers_does(package: Path) -> None:
    decoder = Decoder(BACKEND.open(package, threads=1))
    reference = support.reference(NAME)
    trace = session_trace(decoder, support.PROMPTS, reference.tokens)
    assert compare(trace, reference).equal(numerics.bound(numerics.depth(support.lowered(NAME))))


def test_the_graph_has_no_weights_and_the_files_have_all(package: Path) -> None:
    proto = proto_of(package)
    spec = weight_free.specification(proto)
    assert spec is not None and (spec["version"], spec["model_id"]) == (5, "weights")
    weights = {item["name"] for item in spec["inputs"]}
    assert "model.layers.1.self_attn.q_proj.weight" in weights
    assert weights == {name for name, _ in support.tiny(NAME)[1].named_parameters()}
    assert not weights & {t.name for t in proto.graph.initializer}
    keys: set[tuple[int, str]] = set()
    for index, file in enumerate(spec["files"]):
        with safe_open(package / file["path"], framework="numpy") as opened:  # the library accepts what we wrote
            keys |= {(index, key) for key in opened.keys()}  # noqa: SIM118
    assert {(item["location"]["file"], item["location"]["key"]) for item in spec["inputs"]} <= keys
    assert len(spec["files"]) == 2 and spec["files"][-1]["path"] == weight_free.PREPARED
    assert list(contract.violations(package)) == []


def test_the_files_of_the_checkpoint_are_in_the_package(package: Path) -> None:
    checkpoint = package.parent / "model" / "model.safetensors"
    assert (package / "weights" / checkpoint.name).read_bytes() == checkpoint.read_bytes()


def test_a_forward_pass_answers_as_in_the_usual_form(tmp_path: Path) -> None:
    answers: list[Any] = []
    for name, free in (("usual", False), ("free", True)):
        model = QEFFAutoModel(build("distilbert"))
        model.compile(target="ai100", emit_only=True, seq_len=8, weight_free=free, compile_dir=tmp_path / name)
        ids = np.arange(4, 12)[None]
        answers.append(model.generate({"input_ids": ids, "attention_mask": np.ones_like(ids)}))
    usual, free = answers
    assert set(usual) == set(free)
    assert all(np.array_equal(usual[key], free[key]) and np.any(usual[key]) for key in usual)


def test_the_costs_are_those_of_the_usual_form(package: Path, tmp_path: Path) -> None:
    said: list[Any] = []
    for name, more in (("usual", {}), ("functions", {"sub_functions": True})):
        model = QEFFAutoModelForCausalLM.from_pretrained(package.parent / "model")
        options: dict[str, Any] = {"batch_size": 2, "prefill_seq_len": 8, "ctx_len": 48, **more}
        model.compile(target="ai100", emit_only=True, compile_dir=tmp_path / name, **options)
    for folder in (tmp_path / "usual", tmp_path / "functions", package):
        result = CliRunner().invoke(app, ["cost", str(folder), "--json"])
        assert result.exit_code == 0, result.output
        said.append([{k: v for k, v in item.items() if k != "ops"} for item in json.loads(result.stdout)])
    assert said[0][0]["weight_bytes"] > 0
    assert said[1] == said[0] and said[2] == said[0]


def _other_key(spec: Any) -> None:
    spec["inputs"][0]["location"]["key"] = "gone"


def _outside(spec: Any) -> None:
    spec["files"][0]["path"] = "../model/model.safetensors"


def _swapped(spec: Any) -> None:
    """Two inputs of different shapes exchange their weights."""
    items = {item["name"]: item for item in spec["inputs"]}
    one, two = (items[f"model.layers.0.self_attn.{n}_proj.weight"] for n in ("k", "q"))
    one["location"], two["location"] = two["location"], one["location"]


def _unknown_input(spec: Any) -> None:
    spec["inputs"][0]["name"] = "nobody"


@pytest.mark.parametrize("change", [_other_key, _outside, _swapped, _unknown_input])
def test_a_wrong_place_is_found(change: Callable[[Any], None], damaged: Path) -> None:
    edit_spec(damaged, change)
    assert "weight-free" in codes(damaged)
    with pytest.raises(PackageError):
        BACKEND.open(damaged, threads=1)


def test_weights_that_an_absolute_path_names_are_outside(damaged: Path, tmp_path: Path) -> None:
    """They are there, and right: only where they lie is wrong."""

    def move(spec: Any) -> None:
        own, other = damaged / spec["files"][0]["path"], tmp_path / "elsewhere.safetensors"
        other.write_bytes(own.read_bytes())
        spec["files"][0]["path"] = str(other)

    edit_spec(damaged, move)
    assert "weight-free" in codes(damaged)
    with pytest.raises(PackageError, match=r"elsewhere.safetensors', outside the folder: refused"):
        BACKEND.open(damaged, threads=1)


def test_a_sidecar_that_says_something_else_is_found(damaged: Path) -> None:
    (damaged / weight_free.SPEC).write_text("{}")
    assert "weight-free" in codes(damaged)


def test_metadata_that_are_no_list_are_refused(damaged: Path) -> None:
    edit_spec(damaged, lambda spec: spec.pop("files"))
    assert "weight-free" in codes(damaged)
    with pytest.raises(PackageError, match="no list of weights"):
        BACKEND.open(damaged, threads=1)


def test_a_weight_in_the_usual_form_is_found(damaged: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        made = model.graph.initializer.add(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        made.external_data.add(key="location", value="weights/model.safetensors")

    edit_model(damaged, add)
    assert "weight-free" in codes(damaged)


def test_the_usual_form_is_left_alone() -> None:
    assert not Ai100Options().weight_free
    assert weight_free.specification(onnx.ModelProto()) is None


def test_a_file_of_the_checkpoint_that_is_named_like_ours_is_not_written(tmp_path: Path) -> None:
    support.tiny(NAME)[1].save_pretrained(tmp_path / "model")
    whole, taken = tmp_path / "model" / "model.safetensors", Path(weight_free.PREPARED).name
    with safe_open(whole, framework="numpy") as opened:
        index = {"metadata": {}, "weight_map": dict.fromkeys(opened.keys(), taken)}
    whole.rename(whole.with_name(taken))
    whole.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    before = whole.with_name(taken).read_bytes()
    model = QEFFAutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.compile(
        target="ai100", emit_only=True, weight_free=True, compile_dir=tmp_path / "package",
        batch_size=2, prefill_seq_len=8, ctx_len=48,
    )  # fmt: skip
    assert whole.with_name(taken).read_bytes() == before
    trace = session_trace(
        Decoder(BACKEND.open(tmp_path / "package", threads=1)), support.PROMPTS, support.reference(NAME).tokens
    )
    assert compare(trace, support.reference(NAME)).equal(numerics.bound(numerics.depth(support.lowered(NAME))))


@pytest.mark.parametrize(("shape", "dtype"), [((32, 32), "INT32"), ((16, 64), "FLOAT")])
def test_another_view_of_a_tensor_is_not_taken_for_the_tensor(
    shape: tuple[int, int], dtype: str, tmp_path: Path
) -> None:
    """A weight may read the bytes of the checkpoint in its own way; the checkpoint's name for them is then not its."""
    support.tiny(NAME)[1].save_pretrained(tmp_path / "model")
    module = open_source(tmp_path / "model").lower()
    value = module.graph.initializers["model.layers.0.self_attn.q_proj.weight"]
    where = file_range(value.const_value)
    assert where is not None and where.shape == (32, 32)
    view = dataclasses.replace(where, shape=shape, dtype=ir.DataType[dtype])
    value.const_value, value.shape, value.dtype = view.tensor(value.name or ""), ir.Shape(shape), view.dtype
    weight_free.save(module.model, tmp_path / "out", "model.onnx", "model")
    proto = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    weight_free.bind(proto, tmp_path / "out")
    (bound,) = (tensor for tensor in proto.graph.initializer if tensor.name == value.name)
    onnx.external_data_helper.load_external_data_for_tensor(bound, str(tmp_path / "out"))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(bound), view.tensor("view").numpy())
