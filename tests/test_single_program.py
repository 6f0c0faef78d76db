"""One program for pictures and text answers as transformers does, and as the two programs do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qeff_ir import QEFFAutoModelForImageTextToText
from qeff_ir.errors import CompileError, PackageError, UnsupportedModelError
from qeff_ir.frontend.export.single_program import join
from qeff_ir.package import MAIN, SIDE_FOLDER, open_package
from qeff_ir.runtime.picture_decoder import PictureDecoder
from qeff_ir.runtime.picture_form import FILE
from qeff_ir.runtime.picture_forms import PictureForms
from tests import multimodal, processors
from tests.processors import PROCESSORS
from tests.test_image_text import SHAPES, answers_like_transformers

# Pixels of one row of the batch each; places and rows for layers, with the pixels of all rows after one another; and
# pictures of a row on an axis of their own.
CASES = [("llava", "onnxruntime"), ("qwen3_vl", "ai100"), ("idefics3", "ai100")]
OTHERS = [(name, target) for name in PROCESSORS for target in ("onnxruntime", "ai100") if (name, target) not in CASES]


def single(name: str, out: Path, target: str, **more: Any) -> QEFFAutoModelForImageTextToText:
    """The tiny model as one program."""
    model = QEFFAutoModelForImageTextToText(multimodal.lively(name), processors.processor(name), kv_offload=False)
    options: dict[str, Any] = {
        "image_size": PROCESSORS[name].size,
        "target": target,
        "emit_only": True,
        **SHAPES,
        **more,
    }
    assert model.compile(compile_dir=out, **options) == str(out)
    return model


@pytest.mark.parametrize(
    ("name", "target"), [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in OTHERS)]
)
def test_tokens_are_those_of_transformers(name: str, target: str, tmp_path: Path) -> None:
    model = single(name, tmp_path, target)
    assert list(open_package(tmp_path).programs) == [MAIN]
    answers_like_transformers(model, name)
    if (name, target) == CASES[0]:
        _told(tmp_path)


def _told(folder: Path) -> None:
    """A package whose pictures are others than the graph's is refused."""
    again = QEFFAutoModelForImageTextToText.from_package(folder).runner()
    assert again.decoder.capacity == 32
    data = json.loads((folder / SIDE_FOLDER / FILE).read_text())
    other = folder.parent / "other"
    shutil.copytree(folder / SIDE_FOLDER, other)
    (other / FILE).write_text(json.dumps({**data, "count": 3}))
    with pytest.raises(PackageError, match="is of other pictures than the encoder takes"):
        PictureDecoder(again.decoder.session, PictureForms.read(other))
    data["sizes"][0]["inputs"]["pixel_values"]["numbers"] = [1]
    (other / FILE).write_text(json.dumps(data))
    with pytest.raises(PackageError, match="there are no pixels"):
        PictureForms.read(other)


def test_what_one_program_does_not_take_is_told(tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"prefill_seq_len": 1}, "a run of one token reads no picture: give prefill_seq_len=2 or more"),
        ({"image_size": [(20, 14), (14, 40)]}, "takes pictures of one size, and 2 are asked for: leave out kv_offload"),
    )
    for more, message in wrong:
        with pytest.raises(CompileError, match=message):
            single("llava_next", tmp_path, "onnxruntime", **more)


def test_an_encoder_of_several_inputs_is_told() -> None:
    from qeff_ir.frontend.checkpoint.weights import memory_weights
    from qeff_ir.frontend.export.encoders import find_features, lower_encoder
    from qeff_ir.frontend.export.pictures import lower_language

    model, example = multimodal.build("llava"), multimodal.picture("llava")
    weights = memory_weights(model)
    encoder = lower_encoder(model, weights, example)
    encoder.graph.inputs.append(encoder.graph.inputs[0])
    language = lower_language(model, weights, find_features(model, example))
    with pytest.raises(UnsupportedModelError, match="takes pixel_values, pixel_values: one program for pictures and"):
        join(language, encoder, batched=True)
