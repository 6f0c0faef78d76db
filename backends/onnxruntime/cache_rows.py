"""The rows of the caches that a run continues, as a part of the same buffers: nothing is copied (continuous batching).

A graph takes as many rows of its states as a run has. The session gives it the shortest span of the buffers that holds
the rows which the run names; others in the span idle, as padding does. So a prefill run of one request costs one row,
and a decode run costs what its live rows span. Rows that the graph gathers and scatters cost copies of whole caches: a
decode run of 8 rows of 2,048 slots took 63 ms that way, and takes 6.7 ms (4 layers of width 256, one thread).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir.ports import ALL_PLANES, CACHE_ROW, POSITIONS, Port
from qeff_ir.runtime.interface import BATCH

_EMPTY = {POSITIONS: -1, ALL_PLANES: -1}
"""What padding has at an input of a role; 0 at any other."""


@dataclass(frozen=True)
class Span:
    """The rows of the caches that a run is given.

    Attributes:
        first: The first of them.
        count: How many.
        rows: The rows of the run that are not idle, int64 ``[live]``.
        places: Where in the span each of these goes, int64 ``[live]``.
        size: Rows of the run.
    """

    first: int
    count: int
    rows: Array
    places: Array
    size: int

    @property
    def whole(self) -> bool:
        """Whether the span holds the rows of the run, all of them and in their order."""
        return self.size == self.count == len(self.rows) and bool((self.places == np.arange(self.size)).all())

    def given(self, inputs: Mapping[str, Array], ports: Sequence[Port]) -> dict[str, Array]:
        """The inputs of a run over the rows of the span."""
        return {port.name: self._spread(inputs[port.name], port) for port in ports}

    def _spread(self, array: Array, port: Port) -> Array:
        axis = port.shape.index(BATCH) if BATCH in port.shape else None
        if axis is None or self.whole:
            return array
        shape = [self.count if at == axis else size for at, size in enumerate(array.shape)]
        spread = np.full(shape, 0 if port.role is None else _EMPTY.get(port.role, 0), dtype=array.dtype)
        before = (slice(None),) * axis
        spread[(*before, self.places)] = array[(*before, self.rows)]
        return spread

    def returned(self, array: Array) -> Array:
        """What the rows of the run return, ``[batch, ...]``, of what those of the span do; 0 for idle ones."""
        if self.whole:
            return array
        found = np.zeros((self.size, *array.shape[1:]), dtype=array.dtype)
        found[self.rows] = array[self.places]
        return found


def span_of(index: Array, rows: int) -> Span:
    """The span of a run.

    Args:
        index: Row of the caches that each row of the run continues, int64 ``[batch, 1]``; less than 0 is none.
        rows: Rows of the caches.

    Raises:
        RuntimeInputError: There is no such row, or two rows of the run continue the same.
    """
    named = index[:, 0]
    live = np.flatnonzero(named >= 0)
    at = named[live]
    if not len(at):  # all idle: one row of padding
        return Span(0, 1, live, at, len(index))
    first, last = int(at.min()), int(at.max())
    if last >= rows or len(np.unique(at)) < len(at):
        raise RuntimeInputError(
            f"the run continues the rows {at.tolist()} of {rows} of the caches: give different ones below {rows}, and "
            f"-1 for rows that idle, as {CACHE_ROW.name}"
        )
    return Span(first, last - first + 1, live, at - first, len(index))
