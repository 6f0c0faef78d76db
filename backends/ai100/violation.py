"""What the checks find: a broken rule with a stable code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qeff_ir.errors import CompileError


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of the AI 100 contract.

    Attributes:
        code: Stable name of the rule.
        message: What is wrong, where, and what to do, in one sentence.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


def refuse_first(violations: Iterable[Violation]) -> None:
    """Do nothing when there is no violation.

    Raises:
        CompileError: The first one, if any.
    """
    for violation in violations:
        raise CompileError(str(violation))
