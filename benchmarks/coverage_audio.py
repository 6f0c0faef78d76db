"""Models of sounds and text: those that transformers knows as multimodal, and not of pictures and text."""

from __future__ import annotations

from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from benchmarks.coverage_multimodal import Multimodal

COVERAGE = Multimodal(
    "audio",
    AutoModelForMultimodalLM,
    set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "coverage_audio_text.toml",
)
