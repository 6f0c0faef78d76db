"""What is asked of one architecture, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

PASSED = "pass"


@dataclass
class Row:
    """What became of one architecture.

    Attributes:
        architecture: transformers' name of it.
        transformers: Version that it was seen on.
        model: The model's class.
        result: `PASSED`, ``absent`` (it cannot be a decoder with retained states) or ``fail``.
        error: The largest ``max|error| / rms`` of the logits by backend.
        bound: What the tests allow that to be (`qeff_ir.numerics.bound`).
        limit: What is allowed here: the bound, or more where transformers differs from itself by more.
        nodes: Nodes of the lowered graph.
        states: Retained tensors.
        seconds: Of the whole check.
        reason: One sentence, when it did not pass.
    """

    architecture: str
    transformers: str = ""
    model: str = ""
    result: str = "fail"
    error: dict[str, float] = field(default_factory=dict[str, float])
    bound: float = 0.0
    limit: float = 0.0
    nodes: int = 0
    states: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """One check, for a process of its own.

    Attributes:
        name: The architecture; for a folder, how it is called in the table.
        files: Modelling files of the user's, imported first; they register what they define.
        folder: A model folder whose configuration is used instead of the architecture's default.
        trust: Whether code of the folder may run.
        memory: Bytes that the process may take.
    """

    name: str
    files: tuple[Path, ...] = ()
    folder: Path | None = None
    trust: bool = False
    memory: int = 0
