"""The package of a plain decoder, spelled out: every name, type, shape and file that the contract fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from qeff_ir import QEFFAutoModelForCausalLM
from tests import support

LAYERS = (0, 1)
STATES = [f"past_{role}.{layer}" for layer in LAYERS for role in ("key", "value")]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "out"
    model = QEFFAutoModelForCausalLM._opened(support.Lowered("llama"))
    options: dict[str, Any] = {"prefill_seq_len": 8, "ctx_len": 48, "batch_size": 2, "num_devices": 2, "num_cores": 14}
    model.compile(
        target="ai100", emit_only=True, compile_dir=folder, mxfp6_matmul=True, mxint8_kv_cache=True, **options
    )
    return folder


def described(values: list[onnx.ValueInfoProto]) -> list[tuple[str, str, list[str | int]]]:
    """Name, element type and dims of graph inputs or outputs."""
    return [
        (
            v.name,
            onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type),
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    ]


def test_inputs_and_outputs(package: Path) -> None:
    graph = onnx.load(package / "LlamaForCausalLM.onnx", load_external_data=False).graph
    cache: list[str | int] = ["batch_size", 2, "ctx_len", 8]
    assert described(list(graph.input)) == [
        ("input_ids", "INT64", ["batch_size", "seq_len"]),
        ("position_ids", "INT64", ["batch_size", "seq_len"]),
        *((name, "FLOAT", cache) for name in STATES),
    ]
    assert described(list(graph.output)) == [
        ("logits", "FLOAT", ["batch_size", 1, 97]),
        *((f"{name}_RetainedState", "FLOAT", cache) for name in STATES),
    ]


def test_operators(package: Path) -> None:
    model = onnx.load(package / "LlamaForCausalLM.onnx", load_external_data=False)
    assert {(o.domain, o.version) for o in model.opset_import} == {
        ("", 18),
        ("com.qualcomm.cloud", 1),
        ("com.qti.aisw.onnx", 1),
    }
    assert {(f.domain, f.name) for f in model.functions} == {
        ("com.qualcomm.cloud", "CtxScatter"),
        ("com.qualcomm.cloud", "CtxGather"),
        ("com.qti.aisw.onnx", "CustomRMSNorm"),
    }


def test_files(package: Path) -> None:
    names = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert {n for n in names if not n.startswith(("weights/", "huggingface/"))} == {
        "LlamaForCausalLM.onnx",
        "specializations.json",
        "custom_io.yaml",
        "mdp_ts_2.json",
        "compile_command.json",
        "package.json",
    }
    assert any(n.startswith("weights/") for n in names)


def test_specializations(package: Path) -> None:
    common = {"batch_size": "2", "ctx_len": "48"}
    assert json.loads((package / "specializations.json").read_text()) == {
        "specializations": [
            {"name": "Prefill", "symbols": {**common, "seq_len": "8"}},
            {"name": "Decode", "symbols": {**common, "seq_len": "1"}},
        ]
    }


def test_custom_io(package: Path) -> None:
    entries = [f" - IOName: {name}{end}\n   Precision: mxint8\n\n" for name in STATES for end in ("", "_RetainedState")]
    assert (package / "custom_io.yaml").read_text() == "".join(entries)


def test_partitions(package: Path) -> None:
    assert json.loads((package / "mdp_ts_2.json").read_text()) == {
        "connections": [{"devices": [0, 1], "type": "p2p"}],
        "partitions": [
            {
                "name": "Partition0",
                "devices": [{"deviceId": 0, "numCores": 14}, {"deviceId": 1, "numCores": 14}],
            }
        ],
    }


def test_command(package: Path) -> None:
    argv = json.loads((package / "compile_command.json").read_text())["argv"]
    assert argv[:4] == [
        "qaic-compile",
        "-aic-hw",
        "-aic-hw-version=ai100",
        "-m=LlamaForCausalLM.onnx",
    ]
    assert set(argv[4:]) == {
        "-mdp-load-partition-config=mdp_ts_2.json",
        "-aic-num-cores=14",
        "-convert-to-fp16",
        "-retained-state",
        "-mxfp6-matmul",
        "-network-specialization-config=specializations.json",
        "-custom-IO-list-file=custom_io.yaml",
        "-aic-binary-dir=qpc",
    }
