"""Videos: frames that are encoded together, to transformers' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qeff_ir import QEFFAutoModel, QEFFAutoModelForImageTextToText
from qeff_ir.errors import CompileError, ModelLoadError, RuntimeInputError, UnsupportedModelError
from qeff_ir.numerics import bound, error_over_rms
from tests import multimodal, processors, support

NEW, SIZE, FRAMES = 6, (24, 16), 4
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
SHAPES: dict[str, Any] = {"image_size": SIZE, "num_frames": FRAMES, "ctx_len": 96, "emit_only": True}


def video(seed: int, frames: int = FRAMES) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8)


def processed(videos: list[Any], texts: list[str], seconds: list[float]) -> dict[str, Any]:
    """What a processor returns, with the seconds between the frames of each video."""
    made = processors.processor("qwen2_5_vl")(videos=videos, text=texts)
    return {**made, "second_per_grid_ts": torch.tensor(seconds)}


def opened(out: Path, target: str = "onnxruntime", **more: Any) -> QEFFAutoModelForImageTextToText:
    model = QEFFAutoModelForImageTextToText(multimodal.lively("qwen2_5_vl"), processors.processor("qwen2_5_vl"))
    options: dict[str, Any] = {**SHAPES, "prefill_seq_len": 8, **more}
    model.compile(target=target, compile_dir=out, **options)
    return model


@pytest.mark.parametrize("target", [pytest.param("onnxruntime", marks=pytest.mark.nightly), "ai100"])
def test_videos_are_answered_as_by_transformers(target: str, tmp_path: Path) -> None:
    model = opened(tmp_path, target, batch_size=2, num_videos=2)
    texts, videos = ["w5 <video> w7 w8 <video> w10", "<video> w12 w13"], [video(1), video(2), video(3)]
    seconds = [1.0, 2.0, 3.0]
    tiny = multimodal.lively("qwen2_5_vl")
    parts = ((videos[:2], texts[:1], seconds[:2]), (videos[2:], texts[1:], seconds[2:]))
    right = [support.generate(tiny, **processed(*part), **GREEDY)[0, -NEW:].tolist() for part in parts]
    assert model.generate(**processed(videos, texts, seconds), **GREEDY)[:, -NEW:].tolist() == right
    again = QEFFAutoModelForImageTextToText.from_package(tmp_path)
    assert again.generate(**processed(videos, texts, seconds), **GREEDY)[:, -NEW:].tolist() == right
    for other in (([video(4)], texts[1:], seconds[2:]), (videos[2:], texts[1:], [1.0])):  # frames and seconds are seen
        assert support.generate(tiny, **processed(*other), **GREEDY)[0, -NEW:].tolist() != right[1]
    longer = processed([video(1, 6), video(2, 6)], ["<video>", "<video>"], [1.0, 1.0])
    with pytest.raises(RuntimeInputError, match=r"of the compiled size \(4 frames of 24 x 16\) takes 12"):
        model.generate(**longer, **GREEDY)
    many = processed(videos, ["<video> <video> <video>", "w5"], seconds)
    with pytest.raises(RuntimeInputError, match=r"for 3 videos of 4 frames of 24 x 16, and the model is compiled for"):
        model.generate(**many, **GREEDY)
    wide = processed([video(1).reshape(FRAMES, 16, 24, 3)] * 2, ["<video>", "<video>"], [1.0, 1.0])
    with pytest.raises(RuntimeInputError, match=r"a video of the compiled size .* gives .*: give as many frames"):
        model.generate(**wide, **GREEDY)
    with pytest.raises(RuntimeInputError, match="prompts are for pictures: give what processor"):
        model.generate(prompts="w5", processor=processors.processor("qwen2_5_vl"))


def test_videos_are_embedded(tmp_path: Path) -> None:
    tiny, processor = multimodal.lively("qwen2_5_vl"), processors.processor("qwen2_5_vl")
    model = QEFFAutoModel(tiny, pooling="last", processor=processor)
    model.compile(target="onnxruntime", compile_dir=tmp_path, **SHAPES)
    given = processed([video(1)], ["w5 <video> w6"], [1.0])
    with torch.no_grad():
        right = tiny.base_model(**given).last_hidden_state[0, -1].numpy()
    assert error_over_rms(model.generate(given)["output"][0], right) <= bound(6 * (2 + 3) + 3)


def test_videos_that_cannot_be_compiled_are_told(tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1, not 0"),
        ({"num_videos": 0}, "num_videos must be a whole number of at least 1, not 0"),
        ({"num_images": 2}, "a package is for pictures or for videos"),
        ({"num_frames": 3}, "does not take a video of frames of 24 x 16 .*: give another image_size or num_frames"),
        ({"num_videos": 8}, "8 videos of 4 frames of 24 x 16 take up to 96 tokens"),
    )
    for more, message in wrong:
        with pytest.raises(CompileError, match=message):
            opened(tmp_path, **more)
    plain = QEFFAutoModelForImageTextToText(multimodal.lively("llava"), processors.processor("llava"))
    with pytest.raises(UnsupportedModelError, match=r"has no get_video_features, by which .* encode a video apart"):
        plain.compile(**SHAPES)
    whole = QEFFAutoModelForImageTextToText(
        multimodal.lively("qwen2_5_vl"), processors.processor("qwen2_5_vl"), kv_offload=False
    )
    with pytest.raises(CompileError, match="one program for pictures and text takes no videos"):
        whole.compile(**SHAPES)
    multimodal.lively("qwen2_5_vl").save_pretrained(tmp_path / "model")
    with pytest.raises(ModelLoadError, match="has no video processor that can be read"):
        QEFFAutoModelForImageTextToText.from_pretrained(tmp_path / "model").compile(**SHAPES)
