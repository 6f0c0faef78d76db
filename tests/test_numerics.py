"""The comparison refuses to compare nothing, and measures what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qeff_ir import numerics
from qeff_ir.testing.trace import Trace, compare

GOOD = np.array([1.0, -2.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "reference",
    [
        np.empty(0),
        np.empty((0, 3)),
        np.zeros(4),
        np.full(4, 7.0),
        np.array([5.0]),
        np.array([1.0, np.nan]),
        np.array([1.0, np.inf]),
        np.array([np.nan, np.nan]),
    ],
)
def test_a_reference_that_teaches_nothing_is_refused(reference: np.ndarray) -> None:
    with pytest.raises(ValueError, match="nothing can be learnt"):
        numerics.error_over_rms(reference.copy(), reference)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        numerics.error_over_rms(GOOD[:, None], GOOD)


def test_the_error_is_the_largest_over_the_root_mean_square() -> None:
    values = GOOD + np.array([0.0, 0.3, 0.0, -0.1])
    assert numerics.error_over_rms(values, GOOD) == pytest.approx(0.3 / math.sqrt(4.5))
    assert numerics.error_over_rms(GOOD, GOOD) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_result_that_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    values = GOOD.copy()
    values[2] = bad
    assert numerics.error_over_rms(values, GOOD) == math.inf


def test_differences_below_float32_count() -> None:
    """Both sides are taken as float64, so that the measure itself rounds nothing away."""
    values = GOOD + np.array([0.0, 1e-12, 0.0, 0.0])
    assert 0.0 < numerics.error_over_rms(values, GOOD) < 1e-12


def test_the_bound_is_that_of_the_policy() -> None:
    assert numerics.bound(64) == pytest.approx(3.8e-6, rel=0.01)  # 8 u, times the root of the depth
    assert numerics.bound(4) == 2 * numerics.bound(1) == 16 * 2.0**-24


def test_a_comparison_counts_the_steps_before_the_first_other_token() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 2, 5)).astype(np.float32)
    reference = Trace(logits.argmax(-1), logits)
    assert compare(reference, reference).equal(0.0)
    tokens = reference.tokens.copy()
    tokens[2, 1] += 1
    worse = compare(Trace(tokens, logits), reference)
    assert (worse.agreement, worse.steps, worse.error) == (2, 4, 0.0)
    assert not worse.equal(1.0)
