"""Packages of pictures and text for the AI 100, spelled out; each damage to one is found by its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from backends.ai100 import contract
from backends.ai100.backend import BACKEND
from backends.ai100.device import DeviceSession
from backends.ai100.emit import COMMAND, CUSTOM_IO
from backends.ai100.specializations import FILE
from qeff_ir import QEFFAutoModelForImageTextToText
from tests import multimodal, processors
from tests.backends.ai100 import fake_qaicrt
from tests.backends.ai100.test_contract import _io, _rename, _set_dim, _set_type, codes, edit_model
from tests.backends.ai100.test_device import put
from tests.processors import PROCESSORS


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of tiles, one of places on axes and rows for layers, one of tokens that see one another."""
    found: dict[str, Path] = {}
    for name in ("llava_next", "qwen3_vl", "gemma3"):
        model = QEFFAutoModelForImageTextToText(multimodal.lively(name), processors.processor(name))
        model.compile(
            image_size=PROCESSORS[name].size, num_images=2, target="ai100", emit_only=True, prefill_seq_len=8,
            ctx_len=192, compile_dir=tmp_path_factory.mktemp(name) / "out",
        )  # fmt: skip
        found[name] = model.package.folder
    return found


def ports(folder: Path) -> dict[str, tuple[str, list[str | int]]]:
    """Type and shape of each input and output, in order."""
    (file,) = folder.glob("*.onnx")
    graph = onnx.load(str(file), load_external_data=False).graph
    return {
        v.name: (
            TensorProto.DataType.Name(v.type.tensor_type.elem_type),
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in (*graph.input, *graph.output)
    }


STATE = ("FLOAT", ["batch_size", 2, "ctx_len", 8])
ROWS = ("FLOAT", ["batch_size", 92, 32])
INDEX = ("INT64", ["batch_size", 1])
TOKENS = ("INT64", ["batch_size", "seq_len"])


def test_rows_travel_to_the_card_once_and_stay(
    packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(packages["llava_next"], tmp_path / "package")
    (folder / "qpc").mkdir()
    (folder / "qpc" / "programqpc.bin").touch()
    states = {name: [1, 2, 192, 8] for name in ports(folder) if name.startswith("past_") and "Retained" not in name}
    rows = {"vision_embeds": [1, 92, 32]}
    descriptor = fake_qaicrt.written_descriptor([(1, 8), (1, 1)], states, rows, "image_idx", ("image_idx_output",))
    log = put(monkeypatch, descriptor)
    session = BACKEND.open(folder)
    assert isinstance(session, DeviceSession)
    given = {name: np.zeros((1, 1), int) for name in ("input_ids", "position_ids", "image_idx")}
    session.write("vision_embeds", np.full(rows["vision_embeds"], 0.5, np.float32))
    session.reset()  # a new request begins after its pictures are written
    for taken in (["takes vision_embeds"], []):
        log.clear()
        assert session.run(given)["logits"][0, 0, 3] == 0.5 * np.prod(rows["vision_embeds"])
        assert [line for line in log if line.startswith("takes")] == taken


def test_the_cache_of_the_language_model_is_compressed(tmp_path: Path) -> None:
    model = QEFFAutoModelForImageTextToText(multimodal.lively("llava"), processors.processor("llava"))
    model.compile(
        image_size=PROCESSORS["llava"].size, target="ai100", emit_only=True, prefill_seq_len=8, ctx_len=64,
        compile_dir=tmp_path, mxint8_kv_cache=True,
    )  # fmt: skip
    assert "mxint8" in (tmp_path / CUSTOM_IO).read_text()
    assert "mxint8" not in (tmp_path / "vision" / CUSTOM_IO).read_text()


def test_both_programs_of_a_package_are_spelled_out(packages: dict[str, Path]) -> None:
    folder = packages["llava_next"]
    states = [f"past_{kind}.{layer}" for layer in range(3) for kind in ("key", "value")]
    assert ports(folder) == {
        "input_ids": TOKENS,
        "vision_embeds": ROWS,
        "position_ids": TOKENS,
        "image_idx": INDEX,
        **dict.fromkeys(states, STATE),
        "logits": ("FLOAT", ["batch_size", 1, 99]),
        "vision_embeds_RetainedState": ROWS,
        "image_idx_output": INDEX,
        **{f"{name}_RetainedState": STATE for name in states},
    }
    assert ports(folder / "vision") == {
        "pixel_values": ("FLOAT", [1, 3, 3, 16, 16]),
        "vision_embeds": ("FLOAT", [1, 46, 32]),
    }
    entries = (folder / CUSTOM_IO).read_text()
    kept = [name for one in ("vision_embeds", *states) for name in (one, f"{one}_RetainedState")]
    assert entries == "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in kept)
    entries = (folder / "vision" / CUSTOM_IO).read_text()
    made = ("pixel_values", "vision_embeds")
    assert entries == "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in made)
    sizes = {place: json.loads((place / FILE).read_text())["specializations"] for place in (folder, folder / "vision")}
    common = {"batch_size": "1", "ctx_len": "192"}
    assert sizes[folder] == [
        {"name": "Prefill", "symbols": {**common, "seq_len": "8"}},
        {"name": "Decode", "symbols": {**common, "seq_len": "1"}},
    ]
    assert sizes[folder / "vision"] == [{"name": "Vision", "symbols": {"batch_size": "1"}}]
    flags = {place: json.loads((place / COMMAND).read_text())["argv"] for place in sizes}
    assert "-retained-state" in flags[folder] and "-retained-state" not in flags[folder / "vision"]
    assert all(f"-custom-IO-list-file={CUSTOM_IO}" in argv for argv in flags.values())


def test_places_layers_and_kinds_of_tokens_have_their_inputs(packages: dict[str, Path]) -> None:
    found = {name: [n for n in ports(folder) if "past" not in n] for name, folder in packages.items()}
    assert found["qwen3_vl"] == [
        "input_ids", "vision_embeds", "deepstack_features", "position_ids", "image_idx",
        "logits", "vision_embeds_RetainedState", "deepstack_features_RetainedState", "image_idx_output",
    ]  # fmt: skip
    assert found["gemma3"][:5] == ["input_ids", "vision_embeds", "position_ids", "image_idx", "mm_token_type_ids"]
    shapes = {name: shape for name, (_, shape) in ports(packages["qwen3_vl"]).items()}
    assert shapes["position_ids"] == [4, "batch_size", "seq_len"]
    assert shapes["deepstack_features"] == [2, "batch_size", 12, 32]
    assert ports(packages["qwen3_vl"] / "vision")["deepstack_features"] == ("FLOAT", [2, 1, 6, 32])
    assert all(codes(place) == set() for folder in packages.values() for place in (folder, folder / "vision"))


def _drop(kind: str, name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        values = getattr(model.graph, kind)
        values.remove(next(v for v in values if v.name == name))

    return change


def _fix(name: str, axis: int, size: int) -> Callable[[onnx.ModelProto], None]:
    return lambda m: setattr(_io(m, name).type.tensor_type.shape.dim[axis], "dim_value", size)


def _last_first(kind: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        values = getattr(model.graph, kind)
        values.insert(0, values.pop())

    return change


DAMAGE: list[tuple[str, Callable[[onnx.ModelProto], object], set[str]]] = [
    ("", lambda m: _rename(m, "image_idx", "row_idx"), {"inputs", "state-pair", "dtype-shape"}),
    ("", _drop("output", "image_idx_output"), {"inputs"}),
    ("", _drop("output", "vision_embeds_RetainedState"), {"state-pair", "custom-io"}),
    ("", lambda m: _rename(m, "image_idx_output", "next"), {"inputs", "outputs"}),
    ("", _last_first("input"), {"inputs"}),
    ("", _last_first("output"), {"outputs"}),
    ("", _set_type("image_idx", TensorProto.INT32), {"dtype-shape"}),
    ("", _set_type("image_idx_output", TensorProto.FLOAT), {"dtype-shape"}),
    ("", _fix("position_ids", 0, 3), {"dtype-shape"}),
    ("", _set_type("vision_embeds", TensorProto.FLOAT16), {"dtype-shape", "state-pair"}),
    ("", _set_dim("vision_embeds", 1, "ctx_len"), {"dtype-shape", "state-pair"}),
    ("", _fix("deepstack_features", 2, 11), {"dtype-shape", "state-pair"}),
    ("vision", _last_first("output"), {"outputs"}),
    ("vision", _set_dim("pixel_values", 0, "batch_size"), {"dtype-shape"}),
    ("vision", _set_type("vision_embeds", TensorProto.FLOAT16), {"dtype-shape"}),
    ("vision", _fix("deepstack_features", 3, 31), {"dtype-shape"}),
]


@pytest.mark.parametrize(("place", "change", "expected"), DAMAGE)
def test_a_damaged_graph_is_found(
    place: str,
    change: Callable[[onnx.ModelProto], object],
    expected: set[str],
    packages: dict[str, Path],
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(packages["qwen3_vl"], tmp_path / "copy"))
    edit_model(copy / place, change)
    assert codes(copy / place) == expected


@pytest.mark.parametrize("place", ["", "vision"])
@pytest.mark.parametrize(
    ("old", "new"), [("float16", "mxint8"), (" - IOName: vision_embeds\n   Precision: float16\n\n", "")]
)
def test_rows_are_listed_in_half_precision(
    place: str, old: str, new: str, packages: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(packages["qwen3_vl"], tmp_path / "copy"))
    listed = copy / place / CUSTOM_IO
    text = listed.read_text()
    at = text.index(" - IOName: vision_embeds\n")
    listed.write_text(text[:at] + text[at:].replace(old, new, 1))
    assert codes(copy / place) == {"custom-io"}
    assert [v.code for v in contract.violations(packages["qwen3_vl"] / place)] == []
