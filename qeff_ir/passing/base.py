"""A pass is a frozen dataclass with a name, typed options, and a `run` that changes a module through a `Rewriter`.

    @register
    @dataclass(frozen=True, slots=True)
    class ScaleFold(Pass):
        \"\"\"Fold a scalar Mul into the weight of the MatMul before it.\"\"\"

        name: ClassVar[str] = "scale-fold"
        limit: float = 1e4

        def run(self, module: Module, rewriter: Rewriter) -> None: ...

The fields are the options; the pipeline text `scale-fold{limit=10}` sets them.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import ClassVar, TypeVar

import onnx_ir as ir

import qeff_ir.passing.plugins as plugins
from qeff_ir.errors import PipelineError
from qeff_ir.ir.module import Module
from qeff_ir.numerics import Numeric, Reassociates
from qeff_ir.passing.expect import AnyNumber, Expect
from qeff_ir.passing.report import Missed, PassStats
from qeff_ir.passing.rewriter import OpBuilder, Rewriter

__all__ = [
    "Missed",
    "OpBuilder",
    "Pass",
    "PassStats",
    "Phase",
    "Rewriter",
    "broken_plugins",
    "find_pass",
    "register",
    "registered_passes",
]


class Phase(StrEnum):
    """Where in a pipeline a pass belongs.

    Attributes:
        PREPARE: It brings a graph into its canonical and fused form.
        ADAPT: It adapts the graph to its task: adapters, embeddings, what is returned.
        LOWER: It lowers the graph to the target's operators.
        RETURN: It changes what the lowered graph returns, whatever was lowered before.
    """

    PREPARE = "prepare"
    ADAPT = "adapt"
    LOWER = "lower"
    RETURN = "return"


PHASES = tuple(Phase)
"""The phases in their order."""


class Pass(ABC):
    """One named change of a module.

    Subclasses are frozen dataclasses whose fields are the options (bool, int, float, str, `Literal`, `Optional` of
    them), with a docstring that says what the pass needs and what it guarantees.

    Attributes:
        name: Stable name in pipelines, lower-case with dashes.
        phase: Where in a pipeline it belongs; `Pipeline.add` puts it there.
        requires: Properties that must hold before the pass.
        establishes: Properties that hold after it, whatever its options are (see `established`).
        invalidates: Properties that it may destroy.
        changes_interface: Whether it may change names, types or shapes of graph inputs and outputs, or states.
        changes_weights: Whether it may add, alter or drop weights; they are shared references otherwise.
        folds_constants: Whether it may compute large constants from other constants; weights are none.
        idempotent: Whether a second run changes nothing.
        numeric: What becomes of the numbers, see `qeff_ir.numerics.Numeric`; tests hold a pass to it.
        expect: How often it must fire; any number is fine by default, and what is left over is reported.
    """

    name: ClassVar[str]
    phase: ClassVar[Phase] = Phase.PREPARE
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    changes_interface: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    folds_constants: ClassVar[bool] = False
    idempotent: ClassVar[bool] = False
    numeric: ClassVar[Numeric] = Reassociates()
    expect: ClassVar[Expect] = AnyNumber()

    __slots__ = ()

    @abstractmethod
    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Change the module in place.

        Raises:
            PassError: The pass cannot keep its promise on this module; the manager restores the module.
        """

    def established(self) -> frozenset[str]:
        """Properties that hold after the pass with its options; by default those that it `establishes`."""
        return self.establishes

    def sites(self, module: Module) -> list[ir.Node]:
        """Nodes that the pass should rewrite, found apart from how it matches: too many rather than too few.

        A site that is still found after the pass was missed, unless the pass changed it in place and said so, with
        ``rewriter.rewrite(rule, site)``.
        """
        return []

    def explain(self, module: Module, site: ir.Node) -> Missed:
        """Why the pass left a site alone, when it did not say so itself."""
        return Missed.at(site, "the pass did not touch it", code="untouched")


P = TypeVar("P", bound=Pass)
_REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[P]) -> type[P]:
    """Class decorator that makes a pass known by its name.

    Raises:
        PipelineError: Another class has that name.
    """
    known = _REGISTRY.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PipelineError(f"two passes are named '{cls.name}': {known.__module__} and {cls.__module__}; rename one")
    _REGISTRY[cls.name] = cls
    return cls


def _load_stock() -> None:
    """Import our own passes: by name, as those of plugins, for they lie above this package."""
    for package in ("passes", "backends"):
        importlib.import_module(package).load_passes()


def find_pass(name: str) -> type[Pass] | None:
    """The pass of that name; a plugin is imported only when nothing else has the name."""
    _load_stock()
    if name not in _REGISTRY:
        plugins.load(name)
    if name not in _REGISTRY:
        plugins.load()  # one plugin may register several passes
    return _REGISTRY.get(name)


def registered_passes() -> dict[str, type[Pass]]:
    """All known passes by name: those of `passes`, of each target, and of plugins."""
    _load_stock()
    plugins.load()
    return dict(sorted(_REGISTRY.items()))


def broken_plugins() -> dict[str, str]:
    """Why each plugin that cannot be used cannot, by the name of its entry point."""
    plugins.load()
    return dict(plugins.BROKEN)
