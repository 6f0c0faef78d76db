"""A package whose caches have rows of their own is spelled out, and the contract checker finds what is wrong in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from backends.ai100 import contract
from qeff_ir.compiler import compile_model
from tests import support
from tests.backends.ai100.test_contract import codes, edit_json, edit_model

MODEL = "Qwen3NextForCausalLM.onnx"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and states that are replaced as a whole; not to be damaged."""
    sizes = {"prefill_seq_len": 8, "ctx_len": 40, "full_batch_size": 2, "kv_cache_batch_size": 3}
    folder = tmp_path_factory.mktemp("rows") / "package"
    return compile_model(support.Lowered("qwen3-next"), sizes, target="ai100", out=folder, emit_only=True).folder


@pytest.fixture
def package(emitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(emitted, tmp_path / "package"))


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_the_package_is_that_of_the_contract(emitted: Path) -> None:
    assert list(contract.violations(emitted)) == []
    common = {"ctx_len": "40", "full_batch_size": "3"}
    assert json.loads((emitted / "specializations.json").read_text()) == {
        "specializations": [
            {"name": "Prefill", "symbols": {"batch_size": "1", "seq_len": "8", **common}},
            {"name": "Decode", "symbols": {"batch_size": "2", "seq_len": "1", **common}},
        ]
    }
    graph = onnx.load(str(emitted / MODEL), load_external_data=False).graph
    assert [v.name for v in graph.input] == [
        "input_ids", "position_ids", "conv_state.0", "recurrent_state.0", "past_key.1", "past_value.1", "batch_index",
    ]  # fmt: skip
    shapes = {v.name: _dims(v) for v in (*graph.input, *graph.output)}
    assert shapes["batch_index"] == ["batch_size", 1] and shapes["logits"][:2] == ["batch_size", 1]
    assert {shapes[name][0] for name in shapes if "_state" in name or "past_" in name} == {"full_batch_size"}
    indexed = {node.op_type for node in graph.node if node.domain == "com.qualcomm.cloud"}
    assert indexed == {"CtxScatterCB", "CtxGatherCB", "CtxScatterCB3D", "CtxGatherCB3D"}
    listed = (emitted / "custom_io.yaml").read_text()
    assert "batch_index" not in listed and listed.count("Precision: float16") == 8


def _first(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def _own_rows(model: onnx.ModelProto) -> None:
    node = _first(model, "CtxScatterCB")
    while not node.input[0].startswith("past_key"):
        node = next(n for n in model.graph.node if n.op_type == "CtxScatterCB" and n.input[0].startswith("past_key"))
    node.op_type = "CtxScatter"
    del node.input[1]


def _other_rows(model: onnx.ModelProto) -> None:
    _first(model, "CtxGatherCB").input[1] = "position_ids"


def _type(model: onnx.ModelProto) -> None:
    value = next(v for v in model.graph.input if v.name == "batch_index")
    value.type.tensor_type.elem_type = onnx.TensorProto.INT32


def _rows_of_a_run(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith("past_key.1"):
            value.type.tensor_type.shape.dim[0].dim_param = "batch_size"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_own_rows, "cache-rows"),
        (_other_rows, "cache-rows"),
        (_type, "dtype-shape"),
        (_rows_of_a_run, "dtype-shape"),
    ],
)
def test_a_damaged_model_is_found(package: Path, change: Callable[[onnx.ModelProto], None], code: str) -> None:
    edit_model(package, change)
    assert code in codes(package)


def _symbols(data: Any, number: int) -> dict[str, str]:
    return data["specializations"][number]["symbols"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: _symbols(d, 0).update(full_batch_size="4"), {"cache-rows"}),
        (lambda d: _symbols(d, 1).update(batch_size="4"), {"cache-rows"}),
        (lambda d: _symbols(d, 0).pop("full_batch_size"), {"cache-rows", "symbol"}),
    ],
)
def test_damaged_specializations_are_found(package: Path, change: Callable[[Any], None], expected: set[str]) -> None:
    edit_json(package, "specializations.json", change)
    assert codes(package) == expected
