"""qeff-ir: compiles unmodified Hugging Face causal LMs for Qualcomm Cloud AI 100, and runs them on any CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qeff_ir.auto import QEFFAutoModelForCausalLM as QEFFAutoModelForCausalLM

__version__ = "0.1.0"
__all__ = ["QEFFAutoModelForCausalLM"]


def __getattr__(name: str) -> Any:
    """Import the heavy parts on first use only."""
    if name in __all__:
        from qeff_ir import auto

        return getattr(auto, name)
    raise AttributeError(f"module 'qeff_ir' has no attribute '{name}'")
