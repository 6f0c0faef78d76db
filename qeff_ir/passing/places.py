"""Places in a list of passes: by instance id, and by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qeff_ir.errors import PipelineError
from qeff_ir.passing.base import PHASES, Pass
from qeff_ir.passing.options import nearest


def ids(passes: Sequence[Pass]) -> list[str]:
    """The instance id of each pass: its name, and ``#n`` from the second use on."""
    seen: Counter[str] = Counter()
    found: list[str] = []
    for item in passes:
        seen[item.name] += 1
        found.append(item.name if seen[item.name] == 1 else f"{item.name}#{seen[item.name]}")
    return found


def place(passes: Sequence[Pass], id: str) -> int:
    """Where the pass of an instance id is.

    Raises:
        PipelineError: There is none.
    """
    known = ids(passes)
    if id not in known:
        raise PipelineError(f"there is no '{id}' in the pipeline; {nearest(id, known)}")
    return known.index(id)


def end_of_phase(passes: Sequence[Pass], item: Pass) -> int:
    """Where a pass belongs by its phase: before the first pass of a later one."""
    own = PHASES.index(item.phase)
    return next((at for at, other in enumerate(passes) if PHASES.index(other.phase) > own), len(passes))
