"""qeff-ir: compiles unmodified Hugging Face models for Qualcomm Cloud AI 100, and runs them on any CPU.

The public names are imported on first use (``import qeff_ir`` is fast); ``__init__.pyi`` tells type checkers of them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "QEFFAutoModel": "embedding",
    "QEFFAutoModelForCTC": "heads",
    "QEFFAutoModelForCausalLM": "causal_lm",
    "QEFFAutoModelForImageTextToText": "image_text",
    "QEFFAutoModelForSeq2SeqLM": "seq2seq",
    "QEFFAutoModelForSequenceClassification": "heads",
    "QEFFAutoModelForSpeechSeq2Seq": "seq2seq",
    "QEFFAutoModelForTokenClassification": "heads",
    "QEffAutoLoraModelForCausalLM": "finite_adapters",
    "QEffAutoPeftModelForCausalLM": "adapters",
    "QEffAutoPeftModelForImageTextToText": "adapted_pictures",
    "QEffPeftModelForCausalLM": "peft_model",
}
"""The module of `qeff_ir.auto` that each public name lives in."""

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import the heavy parts on first use only."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"qeff_ir.auto.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qeff_ir' has no attribute '{name}'")
