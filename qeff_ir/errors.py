"""The typed errors of qeff-ir: one sentence each, saying what was wrong, where, and what to do.

Every error that bad input can cause derives from `QeffError`; the command line prints its message on one line and
exits with code 2. Anything else that escapes is a defect of qeff-ir.
"""

from __future__ import annotations


class QeffError(Exception):
    """Base of all errors that qeff-ir raises on purpose."""


class ModelLoadError(QeffError):
    """A model folder, hub id or checkpoint cannot be read."""


class UnsupportedModelError(QeffError):
    """A model cannot be lowered to a retained-state decoder; the message says why."""


class VerificationError(QeffError):
    """A module breaks a rule of the IR.

    The text is one sentence on the first line, then the lines of the IR around the place, then what to do.

    Attributes:
        code: Stable name of the rule, for example ``state-pair``.
        message: The sentence: what is wrong, and where.
        lines: The place in the IR's text form, a caret below it; empty where there is none.
        hint: What to do, as one clause; empty where the sentence says it.
    """

    def __init__(self, code: str, message: str, *, lines: str = "", hint: str = "") -> None:
        super().__init__("\n".join([f"[{code}] {message}", *filter(None, [lines, hint and f"  hint: {hint}"])]))
        self.code, self.message, self.lines, self.hint = code, message, lines, hint


class PipelineError(QeffError):
    """A pipeline text or its options are malformed."""


class PassError(QeffError):
    """A pass could not do what it promises; the module is as it was before the pass."""


class CompileError(QeffError):
    """A target refuses a module, an option or a flag, or its compiler failed."""


class PackageError(QeffError):
    """A package on disk is incomplete, altered, or of another version."""


class RuntimeInputError(QeffError):
    """A request does not fit the compiled model: batch size, prompt length, number of new tokens."""


class AdapterError(QeffError):
    """An adapter cannot be read or does not fit the compiled model, or there is none of that name."""


class EquivalenceError(PassError):
    """A pass changed what the model computes.

    Attributes:
        run: Number of the run of the trace whose output differs most.
        output: Name of that output.
        error: ``max|error| / rms`` of it.
        limit: The largest error that rounding explains.
    """

    def __init__(self, run: int, output: str, error: float, limit: float) -> None:
        super().__init__(
            f"[equivalence] it changed behavior: '{output}' of run {run} differs by {error:.1e} of its rms, "
            f"rounding explains {limit:.1e}"
        )
        self.code = "equivalence"
        self.run, self.output, self.error, self.limit = run, output, error, limit


class BundleError(QeffError):
    """A failure bundle is incomplete, altered, or of another version, or does not fail here."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, short enough for one sentence; its type where it says nothing."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def is_panic(error: BaseException) -> bool:
    """Whether Rust code in a library, a tokenizer, has panicked: no `Exception` to Python, yet no more than one."""
    return type(error).__module__ == "pyo3_runtime"
