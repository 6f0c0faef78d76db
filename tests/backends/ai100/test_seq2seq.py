"""Packages of encoder-decoders for the AI 100, spelled out; each damage to one is found by its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from backends.ai100.emit import COMMAND, CUSTOM_IO
from backends.ai100.specializations import FILE
from qeff_ir import QEFFAutoModelForSeq2SeqLM, QEFFAutoModelForSpeechSeq2Seq
from tests import seq2seq
from tests.backends.ai100.test_contract import _io, _rename, _set_dim, _set_type, codes, edit_json, edit_model
from tests.backends.ai100.test_pictures import _drop, _fix, _last_first, ports
from tests.seq2seq import LENGTH

SHAPES: dict[str, Any] = {"target": "ai100", "emit_only": True, "ctx_len": 32, "batch_size": 2}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForSpeechSeq2Seq:
    model = QEFFAutoModelForSpeechSeq2Seq(seq2seq.tiny("whisper"), seq2seq.Extractor("whisper"))
    model.compile(**SHAPES, compile_dir=tmp_path_factory.mktemp("whisper") / "out")
    return model


STATES = [f"past_{part}.{n}" for n in range(3) for part in ("key_self", "value_self", "key_cross", "value_cross")]
SELF, CROSS = (("FLOAT", ["batch_size", 4, f"{part}_ctx_len", 8]) for part in ("decoder", "encoder"))


def test_a_package_is_spelled_out(whisper: QEFFAutoModelForSpeechSeq2Seq) -> None:
    folder = whisper.package.folder
    tokens = ("INT64", ["batch_size", "seq_len"])
    shapes = {name: SELF if "self" in name else CROSS for name in STATES}
    found = {
        "input_features": ("FLOAT", ["batch_size", 8, "feature_len"]),
        "input_ids": tokens,
        "position_ids": tokens,
        **shapes,
        "logits": ("FLOAT", ["batch_size", 1, 99]),
        **{f"{name}_RetainedState": shape for name, shape in shapes.items()},
    }
    assert ports(folder) == found and list(ports(folder)) == list(found)
    kept = [name for one in STATES for name in (one, f"{one}_RetainedState")]
    listed = "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in (*kept, "input_features"))
    assert (folder / CUSTOM_IO).read_text() == listed
    common = {"batch_size": "2", "decoder_ctx_len": "32", "encoder_ctx_len": "30", "seq_len": "1"}
    assert json.loads((folder / FILE).read_text())["specializations"] == [
        {"name": "Encoder", "symbols": {**common, "feature_len": "60"}},
        {"name": "Decode", "symbols": {**common, "feature_len": "1"}},
    ]
    argv = json.loads((folder / COMMAND).read_text())["argv"]
    assert {"-retained-state", f"-custom-IO-list-file={CUSTOM_IO}", "-convert-to-fp16"} <= set(argv)
    files = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    model = "WhisperForConditionalGeneration.onnx"
    assert files == {model, CUSTOM_IO, FILE, COMMAND, "package.json", "huggingface", "weights"}
    assert codes(folder) == set()


def test_a_decode_keeps_what_the_first_run_has_written(whisper: QEFFAutoModelForSpeechSeq2Seq) -> None:
    """Whatever its features are; another recording is written over it."""
    decoder = whisper.runner().decoder
    first, other = (seq2seq.read("whisper", seed)["input_features"].numpy() for seed in (1, 2))
    decoder.given = {"input_features": first}
    start = decoder.prefill([[2], [2]])
    after = decoder.decode([11, 12])
    decoder.given = {"input_features": first}
    assert np.array_equal(decoder.prefill([[2], [2]]), start)
    decoder._now = np.full_like(decoder._now, 7.0)
    assert np.array_equal(decoder.decode([11, 12]), after)
    decoder.given = {"input_features": other}
    assert not np.array_equal(decoder.prefill([[2], [2]]), start)


def test_a_text_has_tokens_and_a_mask_of_its_own(tmp_path: Path) -> None:
    model = QEFFAutoModelForSeq2SeqLM(seq2seq.tiny("t5"))
    model.compile(**SHAPES, encoder_ctx_len=LENGTH, compile_dir=tmp_path / "out", mxint8_kv_cache=True)
    found = ports(tmp_path / "out")
    assert list(found)[:4] == ["encoder_input_ids", "input_ids", "position_ids", "encoder_attention_mask"]
    assert found["encoder_input_ids"] == ("INT64", ["batch_size", "feature_len"])
    assert found["encoder_attention_mask"] == ("INT64", ["batch_size", LENGTH])
    listed = (tmp_path / "out" / CUSTOM_IO).read_text()
    assert listed.count("mxint8") == 24 and "float16" not in listed
    assert codes(tmp_path / "out") == set()
    edit_model(tmp_path / "out", _set_type("encoder_attention_mask", TensorProto.FLOAT))
    assert codes(tmp_path / "out") == {"dtype-shape"}


def _loses(model: onnx.ModelProto) -> None:
    """A state that is what the encoder makes of nothing."""
    node = next(n for n in model.graph.node if "past_value_cross.1_RetainedState" in n.output)
    node.input[1] = node.input[2]


DAMAGE: list[tuple[Callable[[onnx.ModelProto], object], set[str]]] = [
    (_loses, {"cross-state"}),
    (_last_first("input"), {"inputs"}),
    (_last_first("output"), {"outputs"}),
    (lambda m: _rename(m, "input_features", "mel"), {"inputs", "state-pair", "dtype-shape", "custom-io"}),
    (_drop("output", "past_key_cross.2_RetainedState"), {"state-pair", "custom-io"}),
    (_set_type("input_features", TensorProto.FLOAT16), {"dtype-shape"}),
    (_fix("input_features", 2, 60), {"dtype-shape"}),
    (_set_dim("past_key_self.0", 2, "encoder_ctx_len"), {"dtype-shape", "state-pair"}),
    (_set_dim("past_key_cross.0", 2, "decoder_ctx_len"), {"dtype-shape", "state-pair"}),
    (_set_dim("past_key_cross.0", 2, "sliding_window"), {"dtype-shape", "state-pair", "symbol"}),
    (_set_dim("past_key_self.0", 2, "sliding_window"), {"state-pair", "symbol"}),
]


@pytest.mark.parametrize(("change", "expected"), DAMAGE)
def test_a_damaged_graph_is_found(
    change: Callable[[onnx.ModelProto], object],
    expected: set[str],
    whisper: QEFFAutoModelForSpeechSeq2Seq,
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(whisper.package.folder, tmp_path / "copy"))
    edit_model(copy, change)
    assert codes(copy) == expected


def _symbols(index: int, **sizes: str) -> Callable[[Any], object]:
    return lambda data: data["specializations"][index]["symbols"].update(sizes)


@pytest.mark.parametrize(
    "change",
    [
        _symbols(0, feature_len="1", seq_len="2"),
        _symbols(1, feature_len="2"),
        _symbols(1, encoder_ctx_len="31"),
        lambda data: data["specializations"].pop(),
    ],
)
def test_a_run_with_features_and_one_without(
    change: Callable[[Any], object], whisper: QEFFAutoModelForSpeechSeq2Seq, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(whisper.package.folder, tmp_path / "copy"))
    edit_json(copy, FILE, change)
    assert codes(copy) == {"encoder-runs"}


def test_features_are_listed_in_half_precision(whisper: QEFFAutoModelForSpeechSeq2Seq, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whisper.package.folder, tmp_path / "copy"))
    text = (copy / CUSTOM_IO).read_text()
    (copy / CUSTOM_IO).write_text(text.replace(" - IOName: input_features\n   Precision: float16\n\n", ""))
    assert codes(copy) == {"custom-io"}
    assert _io(onnx.load(str(next(copy.glob("*.onnx"))), load_external_data=False), "input_features").name
