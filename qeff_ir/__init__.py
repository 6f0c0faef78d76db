"""qeff-ir: compiles unmodified Hugging Face causal LMs for Qualcomm Cloud AI 100, and runs them on any CPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_ir.auto.adapters import QEffAutoPeftModelForCausalLM as QEffAutoPeftModelForCausalLM
    from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM as QEFFAutoModelForCausalLM
    from qeff_ir.auto.embedding import QEFFAutoModel as QEFFAutoModel
    from qeff_ir.auto.finite_adapters import QEffAutoLoraModelForCausalLM as QEffAutoLoraModelForCausalLM
    from qeff_ir.auto.heads import QEFFAutoModelForCTC as QEFFAutoModelForCTC
    from qeff_ir.auto.heads import QEFFAutoModelForSequenceClassification as QEFFAutoModelForSequenceClassification
    from qeff_ir.auto.heads import QEFFAutoModelForTokenClassification as QEFFAutoModelForTokenClassification
    from qeff_ir.auto.peft_model import QEffPeftModelForCausalLM as QEffPeftModelForCausalLM

__version__ = "0.1.0"
_HOMES = {
    "QEFFAutoModel": "embedding",
    "QEFFAutoModelForCTC": "heads",
    "QEFFAutoModelForCausalLM": "causal_lm",
    "QEFFAutoModelForSequenceClassification": "heads",
    "QEFFAutoModelForTokenClassification": "heads",
    "QEffAutoLoraModelForCausalLM": "finite_adapters",
    "QEffAutoPeftModelForCausalLM": "adapters",
    "QEffPeftModelForCausalLM": "peft_model",
}
"""The module of `qeff_ir.auto` that each public name lives in."""

__all__ = [
    "QEFFAutoModel",
    "QEFFAutoModelForCTC",
    "QEFFAutoModelForCausalLM",
    "QEFFAutoModelForSequenceClassification",
    "QEFFAutoModelForTokenClassification",
    "QEffAutoLoraModelForCausalLM",
    "QEffAutoPeftModelForCausalLM",
    "QEffPeftModelForCausalLM",
]


def __getattr__(name: str) -> Any:
    """Import the heavy parts on first use only."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"qeff_ir.auto.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qeff_ir' has no attribute '{name}'")
