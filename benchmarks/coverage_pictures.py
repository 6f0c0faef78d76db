"""Models of pictures and text."""

from __future__ import annotations

from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.coverage_multimodal import Multimodal

COVERAGE = Multimodal(
    "image", AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "coverage_image_text.toml"
)
