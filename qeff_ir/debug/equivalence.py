"""The numeric check of every pass: the module before and after it answers the same trace alike (check level 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.debug.drive import Answers, Plan, drive, make_plan
from qeff_ir.errors import EquivalenceError, QeffError
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.ports import LOGITS
from qeff_ir.numerics import bound, depth, error_over_rms
from qeff_ir.passing.base import Pass
from qeff_ir.passing.instrument import Instrument
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.report import PassRun, Report

MARGIN = 4.0
"""How many times its own response to half a unit of rounding in the weights a model may move in one pass."""


class Equivalence(Instrument):
    """Drives the module before and after every pass that changed it, and fails the pass that changed behavior.

    ``8 u sqrt(depth)`` holds for well-conditioned models; a trained one may amplify rounding. So the input is also
    driven with every weight nudged by one unit in the last place, and four times what that moves is allowed.

    Attributes:
        errors: The largest error of each pass that ran, by instance id.
        limit: The largest error that counts as rounding.

    Args:
        seed: Of the trace.
    """

    numeric: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._plan: Plan | None = None
        self._before: Answers | None = None
        self.errors: dict[str, float] = {}
        self.limit = 0.0

    def before_pipeline(self, module: Module, pipeline: Pipeline) -> None:
        """Drive the input once, and once nudged."""
        self._plan = make_plan(module, self._seed)
        self._before = drive(module, self._plan)
        self.errors = {}
        moved = drive(nudged(module, self._seed), self._plan)
        own = max(map(_worst_error, moved.outputs, self._before.outputs))
        self.limit = max(bound(max(depth_of(module), 1)), MARGIN * own)

    def before_pass(self, id: str, item: Pass, module: Module) -> None:
        """Nothing: what the pass is given was driven after the pass before."""

    def after_pass(self, run: PassRun, module: Module) -> None:
        """Drive what the pass made.

        Raises:
            EquivalenceError: It answers otherwise than before the pass.
        """
        assert self._plan is not None and self._before is not None
        error = 0.0
        if run.modified:
            after = drive(module, self._plan)
            error = self._compare(after, self._before)
            self._before = after
        self.errors[run.id] = run.stats.error = error

    def _compare(self, after: Answers, before: Answers) -> float:
        found = [
            (error_of(now[name], was[name]) if name in now else math.inf, index, name)
            for index, (now, was) in enumerate(zip(after.outputs, before.outputs, strict=True))
            for name in was
        ]
        drafts = enumerate(zip(after.drafts, before.drafts, strict=True))
        found += [(error_of(a, b), i, "logits of a draft") for i, (a, b) in drafts if a is not None and b is not None]
        error, index, name = max(found, key=lambda item: item[0])
        if error > self.limit:
            raise EquivalenceError(index, name, error, self.limit)
        return error


class EndToEnd(Equivalence):
    """Holds what a whole pipeline makes against what it was given, whatever its passes do on the way.

    One instance judges many pipelines over the same module, which it drives only once.
    """

    def before_pipeline(self, module: Module, pipeline: Pipeline) -> None:
        """Drive the input, the first time."""
        if self._before is None:
            super().before_pipeline(module, pipeline)

    def after_pass(self, run: PassRun, module: Module) -> None:
        """Nothing: the end counts."""

    def after_pipeline(self, report: Report, module: Module) -> None:
        """Drive the result.

        Raises:
            EquivalenceError: It answers otherwise than the input.
        """
        assert self._plan is not None and self._before is not None
        self._compare(drive(module, self._plan), self._before)


def error_of(values: Array, reference: Array) -> float:
    """``max|error| / rms``; for a constant reference 0 or infinity, as nothing but equality can be asked of one.

    Raises:
        QeffError: The reference is not finite: it cannot tell right from wrong.
    """
    if reference.dtype.kind == "f" and not np.isfinite(reference).all():
        raise QeffError("the module gives infinities or no numbers before the pass: its numbers cannot be compared")
    if values.shape != reference.shape:
        return math.inf
    if reference.size == 0 or np.ptp(np.asarray(reference, dtype=np.float64)) == 0.0:
        return 0.0 if np.allclose(values, reference, rtol=1e-6, atol=0.0) else math.inf
    return error_over_rms(values, reference)


def depth_of(module: Module) -> int:
    """`qeff_ir.numerics.depth` for any graph: without ``logits``, the number of its nodes bounds it."""
    return depth(module) if module.find(LOGITS) is not None else len(module.graph)


def _worst_error(values: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    errors = (error_of(values[name], expected) for name, expected in reference.items())
    return max((e for e in errors if math.isfinite(e)), default=0.0)


def nudged(module: Module, seed: int) -> Module:
    """A copy whose float weights have all moved by one unit in the last place, up or down."""
    random, copy = np.random.default_rng(seed), module.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or WEIGHT_KEY not in value.metadata_props or tensor.dtype != ir.DataType.FLOAT:
            continue
        numbers = tensor.numpy()
        toward = np.where(random.integers(0, 2, numbers.shape) == 1, np.inf, -np.inf).astype(numbers.dtype)
        value.const_value = ir.tensor(np.nextafter(numbers, toward), name=value.name)
    return copy
