"""The bundled demo: a small trained model that adds two-digit numbers, so that its answers can be checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MODEL_FOLDER: Path = Path(__file__).parent / "model"
"""The model, a checkpoint as any other: configuration, weights and tokenizer. `qeff_ir.demo.train` made it."""

ADAPTERS_FOLDER: Path = Path(__file__).parent / "adapters"
"""Adapters of the model, as PEFT saves them, one a folder. `qeff_ir.demo.train_adapters` made them."""

TASKS: dict[str, Callable[[int, int], int]] = {
    "subtract": lambda a, b: abs(a - b),
    "larger": max,
}
"""What each adapter makes of the two numbers of a question."""


def problems() -> list[tuple[str, str]]:
    """Prompts and their right answers; of differing lengths, the last two longer than 32 tokens."""
    return [
        ("47+38=", "85"),
        ("5+8=", "13"),
        ("99+99=", "198"),
        ("12+34=46;60+7=", "67"),
        ("12+34=46;8+19=27;75+75=150;3+4=7;64+58=", "122"),
        ("90+9=99;21+43=64;88+12=100;6+6=12;35+47=82;19+1=20;50+70=120;83+29=", "112"),
    ]
