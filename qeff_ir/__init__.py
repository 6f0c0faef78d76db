"""qeff-ir: compiles unmodified Hugging Face causal LMs for Qualcomm Cloud AI 100, and runs them on any CPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_ir.auto import QEFFAutoModelForCausalLM as QEFFAutoModelForCausalLM
    from qeff_ir.auto_forward import QEFFAutoModel as QEFFAutoModel
    from qeff_ir.auto_forward import QEFFAutoModelForCTC as QEFFAutoModelForCTC
    from qeff_ir.auto_forward import QEFFAutoModelForSequenceClassification as QEFFAutoModelForSequenceClassification
    from qeff_ir.auto_forward import QEFFAutoModelForTokenClassification as QEFFAutoModelForTokenClassification
    from qeff_ir.auto_lora import QEffAutoLoraModelForCausalLM as QEffAutoLoraModelForCausalLM
    from qeff_ir.auto_peft import QEffAutoPeftModelForCausalLM as QEffAutoPeftModelForCausalLM
    from qeff_ir.auto_peft import QEffPeftModelForCausalLM as QEffPeftModelForCausalLM

__version__ = "0.1.0"
_HOMES = {
    "QEFFAutoModel": "auto_forward",
    "QEFFAutoModelForCTC": "auto_forward",
    "QEFFAutoModelForCausalLM": "auto",
    "QEFFAutoModelForSequenceClassification": "auto_forward",
    "QEFFAutoModelForTokenClassification": "auto_forward",
    "QEffAutoLoraModelForCausalLM": "auto_lora",
    "QEffAutoPeftModelForCausalLM": "auto_peft",
    "QEffPeftModelForCausalLM": "auto_peft",
}
"""The module that each public name lives in."""

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
        return getattr(importlib.import_module(f"qeff_ir.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qeff_ir' has no attribute '{name}'")
