"""After the properties: which rules fired, which reasons were given, and what was never exercised."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qeff_ir.passing import manager
from qeff_ir.passing.report import PassRun

FIRED: Counter[str] = Counter()
MISSED: Counter[str] = Counter()


class _Tallied(PassRun):
    """A run that counts what it did."""

    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = self.id.partition("#")[0]
        FIRED.update({f"{name}: {rule}": n for rule, n in self.stats.fired.items()})
        MISSED.update(f"{name}: {m.reason}" for m in self.stats.missed if m.code == "refused")


@pytest.fixture(scope="session", autouse=True)
def _tally() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "PassRun", _Tallied)
        yield


def reasons() -> dict[str, str]:
    """Every reason that a stock pass can give, by the text, with its file: the constants that its functions return."""
    found: dict[str, str] = {}
    root = Path(__file__).parents[2]
    for path in sorted([*root.glob("passes/[a-z]*.py"), *root.glob("backends/*/passes/[a-z]*.py")]):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.returns is not None:
                if ast.unparse(function.returns) != "str | None":
                    continue
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and node.value is not None:
                        values = (
                            [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
                        )
                        found |= {str(v.value): path.name for v in values if isinstance(v, ast.Constant) and v.value}
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not FIRED:
        return
    seen = {text.partition(": ")[2] for text in MISSED}
    terminalreporter.section("what the properties exercised")
    for title, counts in (("rules", FIRED), ("reasons", MISSED)):
        terminalreporter.line(f"{title}: " + ", ".join(f"{name} ({n})" for name, n in sorted(counts.items())))
    never = [f"{file}: {text}" for text, file in reasons().items() if text not in seen]
    terminalreporter.line("reasons never given: " + ("; ".join(never) or "none"))
