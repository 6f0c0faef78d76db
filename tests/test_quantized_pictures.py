"""Models of pictures and text whose checkpoint is quantized answer as transformers does with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, FineGrainedFP8Config

from qeff_ir import QEFFAutoModelForImageTextToText
from qeff_ir.numerics import error_over_rms
from tests import multimodal
from tests import test_image_text as image_text
from tests.frontend.formats.test_fp8 import packed, settings

FORMS = {"onnxruntime": ("onnxruntime", True), "ai100": ("ai100", True), "single program": ("ai100", False)}
"""Target, and whether the encoder is a program of its own."""


def checkpoint(name: str, folder: Path) -> Path:
    """A tiny model in FP8, encoder and language model, but for its tables and head."""
    multimodal.lively(name).save_pretrained(folder)
    image_text.processor(name).save_pretrained(folder)
    pack = packed((16, 16), skip="lm_head|embed|patch|norm")
    tensors: dict[str, torch.Tensor] = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        made = pack(key, weight) if weight.ndim == 2 else None
        tensors |= {key: weight} if made is None else made
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings([16, 16])}))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_answers_as_in_transformers(form: str, tmp_path: Path) -> None:
    name = "llava"
    folder = checkpoint(name, tmp_path / "model")
    fp8 = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, quantization_config=fp8).eval()
    given = image_text.processed(name, [image_text.pictures(name, [1, 2])], image_text.texts(name)[:1])
    expected = image_text.logits(theirs, **given)
    target, two = FORMS[form]
    model = QEFFAutoModelForImageTextToText.from_pretrained(folder, kv_offload=two)
    shapes: dict[str, Any] = {**image_text.SHAPES, "batch_size": 1, "image_size": image_text.PROCESSORS[name].size}
    model.compile(target=target, emit_only=True, compile_dir=tmp_path / "package", **shapes)
    found = image_text.logits(model, **given)
    assert error_over_rms(found, expected) <= image_text.LOOSE
    plain = image_text.logits(multimodal.lively(name), **given)
    assert error_over_rms(plain, expected) > 100 * image_text.LOOSE  # the codes are not the numbers they were made of
