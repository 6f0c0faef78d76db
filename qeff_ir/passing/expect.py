"""How often a pass must fire: counted at sites that are found apart from its pattern."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module

COUNTS: dict[str, Callable[[Module], int]] = {
    "num_layers": lambda module: len({s.layer for s in module.states}),
    "num_decoders": lambda module: int(bool(module.states)),
    "num_states": lambda module: len(module.states),
}
"""Properties of a module that `Exactly` can name instead of a number."""


class Expect(ABC):
    """What a pass promises about how often it fires."""

    @abstractmethod
    def problem(self, module: Module, done: int, left: int) -> str | None:
        """What is wrong, as the start of a sentence, or `None`.

        Args:
            module: The module before the pass.
            done: Sites that were rewritten; rewrites, where the pass has no site finder.
            left: Sites that were not.
        """


@dataclass(frozen=True, slots=True)
class Exactly(Expect):
    """So many, no more and no less; a text names an entry of `COUNTS`."""

    count: int | str

    def problem(self, module: Module, done: int, left: int) -> str | None:
        """See the base."""
        if isinstance(self.count, str) and self.count not in COUNTS:
            raise PassError(f"it expects '{self.count}' rewrites, which is none of {', '.join(COUNTS)}")
        wanted = COUNTS[self.count](module) if isinstance(self.count, str) else self.count
        name = f" ({self.count})" if isinstance(self.count, str) else ""
        return None if done == wanted else f"{_counted(done)} rewritten, exactly {wanted}{name} must be"

    def __str__(self) -> str:
        return f"exactly {self.count}"


@dataclass(frozen=True, slots=True)
class AtLeast(Expect):
    """So many or more."""

    count: int

    def problem(self, module: Module, done: int, left: int) -> str | None:
        """See the base."""
        return None if done >= self.count else f"{_counted(done)} rewritten, at least {self.count} must be"

    def __str__(self) -> str:
        return f"at least {self.count}"


@dataclass(frozen=True, slots=True)
class AllSites(Expect):
    """Every site that there is; a module may have none."""

    def problem(self, module: Module, done: int, left: int) -> str | None:
        """See the base."""
        return f"{left} of {_counted(done + left)} not rewritten" if left else None

    def __str__(self) -> str:
        return "all sites"


@dataclass(frozen=True, slots=True)
class AnyNumber(Expect):
    """As many as match; the rest is reported, and is right as it is."""

    def problem(self, module: Module, done: int, left: int) -> str | None:
        """See the base."""
        return None

    def __str__(self) -> str:
        return "any number"


def _counted(count: int) -> str:
    return "1 site was" if count == 1 else f"{count} sites were"
