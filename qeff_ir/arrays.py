"""The type of arrays that sessions, adapters and comparisons hand to each other."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
"""A NumPy array of any type."""
