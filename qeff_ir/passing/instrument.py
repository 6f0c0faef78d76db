"""Instruments look at a pipeline while it runs: they print, dump, measure, check, and save what is needed to replay.

The hooks of several instruments nest as a stack: ``before_*`` in the order given, the others in the reverse order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TextIO

from qeff_ir.ir.printer import to_text
from qeff_ir.passing.report import PassRun, Report

if TYPE_CHECKING:
    from qeff_ir.ir.module import Module
    from qeff_ir.passing.base import Pass
    from qeff_ir.passing.pipeline import Pipeline

Moment = Literal["before", "after", "changed", "failed"]
"""When to print: ``changed`` is after a pass that changed the module; ``failed`` shows what the pass was given."""


class Instrument:
    """Hooks of a pipeline's run; each does nothing unless overridden, and none may change the module.

    Attributes:
        numeric: Whether it holds the numbers of every pass, which is check level 4.
    """

    numeric: ClassVar[bool] = False

    def before_pipeline(self, module: Module, pipeline: Pipeline) -> None:
        """Nothing has run yet, and the order of the passes has been checked."""

    def before_pass(self, id: str, item: Pass, module: Module) -> None:
        """The pass with this instance id is about to run."""

    def after_pass(self, run: PassRun, module: Module) -> None:
        """A pass has run and all its checks hold.

        Raises:
            QeffError: The instrument finds the result wrong: the pass has failed, and is undone.
        """

    def failed(self, id: str, item: Pass, module_before: Module, error: BaseException) -> None:
        """A pass has failed; the module is again as it was before the pass."""

    def after_pipeline(self, report: Report, module: Module) -> None:
        """Every pass has run."""


class Watch(Instrument):
    """Calls ``tell(id, None)`` before each pass and ``tell(id, run)`` after it."""

    def __init__(self, tell: Callable[[str, PassRun | None], None]) -> None:
        self._tell = tell

    def before_pass(self, id: str, item: Pass, module: Module) -> None:
        self._tell(id, None)

    def after_pass(self, run: PassRun, module: Module) -> None:
        self._tell(run.id, run)


class PrintIR(Instrument):
    """Prints the module around passes.

    Args:
        moments: When.
        only: Names or instance ids of the passes to look at; all of them by default.
        stream: Where to; the standard error by default.
    """

    def __init__(
        self,
        moments: Collection[Moment] = ("after",),
        only: Collection[str] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._moments = frozenset(moments)
        self._only = only
        self._stream = stream

    def before_pass(self, id: str, item: Pass, module: Module) -> None:
        self._print("before", id, module)

    def after_pass(self, run: PassRun, module: Module) -> None:
        self._print("changed" if run.modified and "after" not in self._moments else "after", run.id, module)

    def failed(self, id: str, item: Pass, module_before: Module, error: BaseException) -> None:
        self._print("failed", id, module_before, f": {error}")

    def _print(self, moment: Moment, id: str, module: Module, why: str = "") -> None:
        if moment in self._moments and (self._only is None or {id, id.partition("#")[0]} & set(self._only)):
            print(f"// {moment} {id}{why}\n{to_text(module)}", file=self._stream or sys.stderr, flush=True)


class Dump(Instrument):
    """Writes a numbered folder: the input and the result of every pass as text, and as ONNX that any tool opens.

    Args:
        folder: Where to; made when it is not there.
        only: Names or instance ids of the passes to look at; all of them by default.
    """

    def __init__(self, folder: Path, only: Collection[str] | None = None) -> None:
        self._folder = folder
        self._only = only
        self._number = 0

    def before_pipeline(self, module: Module, pipeline: Pipeline) -> None:
        self._number = 0
        self._write("input", module)

    def before_pass(self, id: str, item: Pass, module: Module) -> None:
        self._number += 1

    def after_pass(self, run: PassRun, module: Module) -> None:
        if self._only is None or {run.id, run.id.partition("#")[0]} & set(self._only):
            self._write(run.id, module)

    def failed(self, id: str, item: Pass, module_before: Module, error: BaseException) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{self._number:02}-{id}.failed.txt").write_text(f"{error}\n")

    def _write(self, id: str, module: Module) -> None:
        from qeff_ir.ir.snapshot import save_module

        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"{self._number:02}-{id}"
        stem.with_name(f"{stem.name}.txt").write_text(to_text(module))
        save_module(module.clone(), stem)  # a clone, for saving writes the facts into the metadata
