"""The image processor and the feature extractor of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from transformers import WhisperFeatureExtractor

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.checkpoint.processors import read_part
from tests import processors

KINDS: tuple[Literal["AutoImageProcessor", "AutoFeatureExtractor"], ...] = (
    "AutoImageProcessor",
    "AutoFeatureExtractor",
)


def test_each_part_is_read(tmp_path: Path) -> None:
    images, sounds = tmp_path / "images", tmp_path / "sounds"
    processors.processor("llava").save_pretrained(images)
    WhisperFeatureExtractor(feature_size=16).save_pretrained(sounds)
    assert read_part("AutoImageProcessor", images, trust_remote_code=False).crop_size["height"] == 16
    assert read_part("AutoFeatureExtractor", sounds, trust_remote_code=False).feature_size == 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_it_is_told(
    kind: Literal["AutoImageProcessor", "AutoFeatureExtractor"], tmp_path: Path
) -> None:
    said = "image processor" if kind == KINDS[0] else "feature extractor"
    with pytest.raises(ModelLoadError, match=rf"has no {said} that can be read \(.*put the model's"):
        read_part(kind, tmp_path, trust_remote_code=False)
