"""Packages of one program for pictures and text, spelled out; each damage to one is found by its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from backends.ai100.emit import COMMAND, CUSTOM_IO
from backends.ai100.specializations import FILE
from qeff_ir import QEFFAutoModelForImageTextToText
from tests import multimodal, processors
from tests.backends.ai100.test_contract import _rename, _set_dim, _set_type, codes, edit_json, edit_model
from tests.backends.ai100.test_pictures import INDEX, STATE, TOKENS, _drop, _fix, _last_first, ports
from tests.processors import PROCESSORS

STATES = [f"past_{kind}.{layer}" for layer in range(3) for kind in ("key", "value")]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of pictures that are resized, and one of tiles."""
    found: dict[str, Path] = {}
    for name in ("llava", "llava_next"):
        model = QEFFAutoModelForImageTextToText(multimodal.lively(name), processors.processor(name), kv_offload=False)
        folder = tmp_path_factory.mktemp(name) / "out"
        path = model.compile(
            image_size=PROCESSORS[name].size, target="ai100", emit_only=True, prefill_seq_len=8, ctx_len=128,
            batch_size=2, compile_dir=folder, mxint8_kv_cache=name == "llava_next",
        )  # fmt: skip
        assert path == str(folder)
        found[name] = folder
    return found


@pytest.mark.parametrize(("name", "picture"), [("llava", [3, 16, 16]), ("llava_next", [3, 3, 16, 16])])
def test_a_package_is_spelled_out(name: str, picture: list[int], packages: dict[str, Path]) -> None:
    folder = packages[name]
    pixels = ("FLOAT", ["batch_size", *picture])
    found = {
        "input_ids": TOKENS,
        "pixel_values": pixels,
        "position_ids": TOKENS,
        "image_idx": INDEX,
        **dict.fromkeys(STATES, STATE),
        "logits": ("FLOAT", ["batch_size", 1, 99]),
        "pixel_values_RetainedState": pixels,
        "image_idx_output": INDEX,
        **{f"{state}_RetainedState": STATE for state in STATES},
    }
    assert ports(folder) == found and list(ports(folder)) == list(found)
    cache = "mxint8" if name == "llava_next" else "float16"
    stored = {"pixel_values": "float16", **dict.fromkeys(STATES, cache)}
    listed = [(one, kept) for state, kept in stored.items() for one in (state, f"{state}_RetainedState")]
    assert (folder / CUSTOM_IO).read_text() == "".join(f" - IOName: {n}\n   Precision: {p}\n\n" for n, p in listed)
    common = {"batch_size": "2", "ctx_len": "128"}
    assert json.loads((folder / FILE).read_text())["specializations"] == [
        {"name": "Prefill", "symbols": {**common, "seq_len": "8"}},
        {"name": "Decode", "symbols": {**common, "seq_len": "1"}},
    ]
    argv = json.loads((folder / COMMAND).read_text())["argv"]
    assert {"-retained-state", f"-custom-IO-list-file={CUSTOM_IO}", "-convert-to-fp16"} <= set(argv)
    files = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    (model,) = folder.glob("*ForConditionalGeneration.onnx")
    assert files == {model.name, CUSTOM_IO, FILE, COMMAND, "package.json", "huggingface", "weights"}
    assert codes(folder) == set()


def _merge(model: onnx.ModelProto) -> onnx.NodeProto:
    """The node that leaves the encoder out of decode runs."""
    alone = next(n.output[0] for n in model.graph.node if n.op_type == "Equal" and _comes_from(model, n, "Shape"))
    return next(n for n in model.graph.node if n.op_type == "Where" and n.input[0] == alone)


def _comes_from(model: onnx.ModelProto, node: onnx.NodeProto, op: str) -> bool:
    return any(n.op_type == op and n.output[0] in node.input for n in model.graph.node)


def _always(model: onnx.ModelProto) -> None:
    """A run of one token reads pictures."""
    _merge(model).input[1] = _merge(model).input[2]


def _never(model: onnx.ModelProto) -> None:
    """It is compared with two tokens."""
    alone = next(n for n in model.graph.node if n.op_type == "Equal" and _comes_from(model, n, "Shape"))
    two = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(_one(model, alone)) + 1, "two")
    model.graph.initializer.append(two)
    at = next(at for at, name in enumerate(alone.input) if name == _one(model, alone).name)
    alone.input[at] = "two"


def _one(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name in node.input)


DAMAGE: list[tuple[Callable[[onnx.ModelProto], object], set[str]]] = [
    (_always, {"encoder-runs"}),
    (_never, {"encoder-runs"}),
    (_last_first("input"), {"inputs"}),
    (_last_first("output"), {"outputs"}),
    (lambda m: _rename(m, "pixel_values", "pixels"), {"inputs", "outputs", "state-pair"}),
    (_drop("output", "pixel_values_RetainedState"), {"state-pair", "custom-io"}),
    (_drop("output", "image_idx_output"), {"inputs"}),
    (_set_type("pixel_values", TensorProto.FLOAT16), {"dtype-shape", "state-pair"}),
    (_set_dim("pixel_values", 2, "seq_len"), {"dtype-shape", "state-pair"}),
    (_fix("pixel_values", 0, 2), {"state-pair"}),
]


@pytest.mark.parametrize(("change", "expected"), DAMAGE)
def test_a_damaged_graph_is_found(
    change: Callable[[onnx.ModelProto], object], expected: set[str], packages: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(packages["llava"], tmp_path / "copy"))
    edit_model(copy, change)
    assert codes(copy) == expected


def test_pictures_that_no_run_reads_are_found(packages: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packages["llava"], tmp_path / "copy"))
    edit_json(copy, FILE, _only_decode)
    assert codes(copy) == {"encoder-runs"}


def _only_decode(data: Any) -> None:
    del data["specializations"][0]


def test_pixels_are_listed_in_half_precision(packages: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packages["llava_next"], tmp_path / "copy"))
    text = (copy / CUSTOM_IO).read_text()
    (copy / CUSTOM_IO).write_text(text.replace("float16", "mxint8"))
    assert codes(copy) == {"custom-io"}
