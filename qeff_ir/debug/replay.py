"""Run a bundle again: does it fail in the same way?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qeff_ir.debug.bundle import Bundle, describe
from qeff_ir.debug.equivalence import Equivalence
from qeff_ir.errors import BundleError
from qeff_ir.ir.module import Module
from qeff_ir.passing.instrument import Instrument
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline

NUMERIC = 4
"""The check level at which every pass is held against a trace."""


@dataclass(frozen=True)
class Failure:
    """How a pipeline failed, without what differs from run to run.

    Attributes:
        pass_id: Instance id of the pass.
        error: Class of the error.
        code: Its code, where it has one.
        message: Its text.
    """

    pass_id: str
    error: str
    code: str
    message: str

    def like(self, other: Failure | None) -> bool:
        """Whether another failure is of the same kind: same class and code, whatever the text says."""
        return other is not None and (self.error, self.code) == (other.error, other.code)


class _Last(Instrument):
    """Remembers which pass failed."""

    failure: Failure | None = None

    def failed(self, id: str, item: object, module_before: Module, error: BaseException) -> None:
        self.failure = Failure(id, *describe(error), str(error))


def attempt(
    module: Module,
    pipeline: Pipeline,
    check: int,
    *,
    seed: int = 0,
    budgets: Mapping[str, int] | None = None,
    instruments: Sequence[Instrument] = (),
) -> Failure | None:
    """Run a pipeline on a copy of a module.

    Returns:
        How it failed, or `None` when it did not. A pipeline that cannot start fails as the pass ``(start)``.
    """
    last = _Last()
    numeric = [Equivalence(seed)] if check >= NUMERIC else []
    try:
        stack = [*numeric, last, *instruments]
        run_pipeline(module.clone(), pipeline, instruments=stack, check=check, budgets=budgets)
    except Exception as error:  # whatever a pass raises is what is looked for
        return last.failure or Failure("(start)", *describe(error), str(error))
    return None


def recorded(bundle: Bundle) -> Failure:
    """The failure that a bundle tells of."""
    data = bundle.metadata
    return Failure(data.pass_id, data.error, data.code, data.message)


def failing_pass(bundle: Bundle) -> Pipeline:
    """The failing pass alone, as a pipeline.

    Raises:
        PipelineError: It is not known here.
        BundleError: The bundle names none, or one that reads outside of it.
    """
    passes = bundle.suffix.passes
    if not passes:
        raise BundleError(f"{bundle.folder} names no failing pass: its suffix is empty")
    return Pipeline(passes[:1])


def replay(bundle: Bundle) -> tuple[bool, str]:
    """Run the failing pass again on the module that it was given.

    Returns:
        Whether it fails in the same way, and a sentence that says what happened.

    Raises:
        PipelineError: The pass is not known here.
    """
    data, was = bundle.metadata, recorded(bundle)
    now = attempt(bundle.module, failing_pass(bundle), data.check, seed=data.seed)
    if now is None:
        return False, f"it does not fail any more: {was.pass_id} runs without an error"
    if not was.like(now):
        return False, f"it fails in another way: {_kind(now)} instead of {_kind(was)}: {now.message}"
    return True, f"it fails in the same way: {now.message}"


def _kind(failure: Failure) -> str:
    return failure.error + (f" [{failure.code}]" if failure.code else "")
