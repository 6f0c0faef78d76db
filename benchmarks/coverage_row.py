"""What is asked of one architecture, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qeff_ir.testing.trace import Comparison

PASSED = "pass"

_ROUNDINGS = 4.0
"""How many times transformers' own rounding error ours may be, for models that are worse conditioned than the bound."""
_WORST = 16.0
"""And how many times the bound at most: a planted fault shows at a hundred times."""


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

    def allow(self, rounding: float) -> None:
        """Set the limit by the bound and transformers' own ``max|error| / rms``."""
        self.limit = min(max(self.bound, _ROUNDINGS * rounding), _WORST * self.bound)

    def hold(self, target: str, found: Comparison) -> None:
        """Note what a backend answers."""
        self.error[target] = found.error
        if not found.equal(self.limit):
            self.fail(f"{target} differs by {found.error:.1e}, tokens agree for {found.agreement} steps")

    def fail(self, reason: str) -> None:
        """Note what is wrong."""
        self.reason += f"; {reason}" if self.reason else reason

    def conclude(self) -> None:
        """It has passed, unless something was wrong."""
        self.result = "fail" if self.reason else PASSED


@dataclass(frozen=True)
class Job:
    """One check, for a process of its own.

    Attributes:
        name: The architecture; for a folder, how it is called in the table.
        files: Modelling files of the user's, imported first; they register what they define.
        folder: A model folder whose configuration is used instead of the architecture's default.
        trust: Whether code of the folder may run.
        memory: Bytes that the process may take.
        task: What the architecture is checked as, a name of `benchmarks.coverage_task.TASKS`.
    """

    name: str
    files: tuple[Path, ...] = ()
    folder: Path | None = None
    trust: bool = False
    memory: int = 0
    task: str = "text-generation"
