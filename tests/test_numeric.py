"""What passes promise of their numbers: each class tells the smallest breach, and refuses to compare nothing."""

from __future__ import annotations

import numpy as np
import pytest

from qeff_ir.numerics import Approximates, Exact, Numeric, Observed, Reassociates, bound, signal_to_noise
from qeff_ir.passing.base import registered_passes

EXACT = np.random.default_rng(0).standard_normal((4, 9))
CLASSES = [Exact(), Reassociates(), Approximates("half precision", 60.0)]


def observed(after: np.ndarray, before: np.ndarray = EXACT, depth: int = 4) -> Observed:
    return Observed(before.astype(np.float32), after.astype(np.float32), EXACT, depth)


@pytest.mark.parametrize("numeric", CLASSES)
def test_equal_numbers_keep_every_promise(numeric: Numeric) -> None:
    assert numeric.problem(observed(EXACT)) is None


@pytest.mark.parametrize("numeric", CLASSES)
@pytest.mark.parametrize("nothing", [np.empty((0, 3)), np.full((2, 3), 5.0), np.full((2, 3), np.nan)])
def test_nothing_is_refused(numeric: Numeric, nothing: np.ndarray) -> None:
    with pytest.raises(ValueError, match="nothing can be learnt"):
        numeric.problem(Observed(nothing, nothing, nothing, 4))


@pytest.mark.parametrize("numeric", CLASSES)
def test_a_scale_that_is_a_percent_off_is_told(numeric: Numeric) -> None:
    assert numeric.problem(observed(EXACT * 1.01)) is not None


def test_one_bit_is_not_exact() -> None:
    after = EXACT.astype(np.float32)
    after[1, 2] = np.nextafter(after[1, 2], np.float32(np.inf))
    assert "very same bits" in str(Exact().problem(observed(after)))
    assert Reassociates().problem(observed(after)) is None


def test_a_lucky_module_hides_no_mistake_below_the_bound() -> None:
    """Within the bound of the policy, but many times the error before: not what another order of sums makes."""
    depth = 100
    worse = EXACT + 0.9 * bound(depth) * np.sqrt(np.mean(EXACT**2))
    problem = Reassociates().problem(observed(worse, depth=depth))
    assert problem is None  # a hundred products may round that much
    assert Reassociates().problem(observed(worse, depth=5)) is not None


def test_decibels() -> None:
    assert signal_to_noise(EXACT, EXACT) == np.inf
    assert signal_to_noise(EXACT * 1.001, EXACT) == pytest.approx(60.0, abs=1e-6)
    assert signal_to_noise(np.full_like(EXACT, np.nan), EXACT) == -np.inf
    assert "59.2 dB of 60.0 dB" in str(Approximates("half precision", 60.0).problem(observed(EXACT * 1.0011)))


def test_every_stock_pass_declares_a_class() -> None:
    declared = {name: cls.numeric for name, cls in registered_passes().items()}
    assert all(isinstance(n, Numeric) for n in declared.values())
    assert declared["canonicalize"] == Exact()
    assert isinstance(declared["fp16-clip"], Approximates)
