"""What passes and pipelines did, as values and as plain data for tools."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

REPORT_VERSION = 1
"""Version of `Report.to_json`."""


@dataclass(frozen=True, slots=True)
class Missed:
    """A site that a pass looked at and did not rewrite.

    Attributes:
        source: Hugging Face module that the site came from.
        reason: Why, as one clause.
    """

    source: str
    reason: str


@dataclass
class PassStats:
    """What one run of a pass did.

    Attributes:
        fired: Rewrites by rule name.
        missed: Sites that were not rewritten.
    """

    fired: Counter[str] = field(default_factory=Counter[str])
    missed: list[Missed] = field(default_factory=list[Missed])


@dataclass(frozen=True)
class PassRun:
    """What one pass of a pipeline did.

    Attributes:
        id: Instance id, for example ``attention#2``.
        seconds: Wall-clock time, verification included.
        nodes: Nodes of the main graph before and after.
        modified: Whether the module's text form changed.
        stats: Rewrites that fired and sites that were missed.
        rewrites: Rewrites that the rewriter admitted: the numbers that a budget counts in.
    """

    id: str
    seconds: float
    nodes: tuple[int, int]
    modified: bool
    stats: PassStats
    rewrites: int = 0


@dataclass
class Report:
    """What a pipeline did.

    Attributes:
        pipeline: The pipeline as text.
        runs: One entry for each pass that ran.
    """

    pipeline: str
    runs: list[PassRun] = field(default_factory=list[PassRun])

    @property
    def seconds(self) -> float:
        """Wall-clock time of all passes."""
        return sum(r.seconds for r in self.runs)

    def to_json(self) -> dict[str, Any]:
        """Plain data with a schema version, for tools."""
        return {
            "version": REPORT_VERSION,
            "pipeline": self.pipeline,
            "passes": [
                {
                    "id": r.id,
                    "seconds": r.seconds,
                    "nodes": list(r.nodes),
                    "modified": r.modified,
                    "rewrites": r.rewrites,
                    "fired": dict(r.stats.fired),
                    "missed": [{"source": m.source, "reason": m.reason} for m in r.stats.missed],
                }
                for r in self.runs
            ],
        }
