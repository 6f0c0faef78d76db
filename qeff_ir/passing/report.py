"""What passes and pipelines did, as values and as plain data for tools."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx_ir as ir

from qeff_ir.ir.sources import source_text

REPORT_VERSION = 1
"""Version of `Report.to_json`."""


@dataclass(frozen=True, slots=True)
class Missed:
    """A site that a pass looked at and did not rewrite.

    Attributes:
        source: Hugging Face module that the site came from.
        reason: Why, as one clause.
        code: Kind of reason: ``refused`` by the pass, ``no-match`` of a pattern, ``condition`` of a rule that failed,
            ``untouched`` when the pass gave none.
        node: Operator and result of the site.
        reached: How far the pattern got, where there is one.
    """

    source: str
    reason: str
    code: str = "refused"
    node: str = ""
    reached: str = ""

    @classmethod
    def at(cls, site: ir.Node, reason: str, *, code: str = "refused", reached: str = "") -> Missed:
        """The same, with source and node taken from the site."""
        source = source_text(site) or site.name or site.op_type
        return cls(source, reason, code, site_name(site), reached)

    def __str__(self) -> str:
        reached = f" ({self.reached})" if self.reached else ""
        return f"{self.source}: {self.node} [{self.code}] {self.reason}{reached}"


def site_name(site: ir.Node) -> str:
    """Operator and result of a node: what a message calls it, the same before and after a graph is rebuilt."""
    return f"{site.op_type} '{site.outputs[0].name}'"


@dataclass
class PassStats:
    """What one run of a pass did.

    Attributes:
        fired: Rewrites by rule name.
        missed: Sites that were not rewritten.
        error: What the numeric check measured, ``max|error| / rms`` of the worst run; `None` where it did not run.
    """

    fired: Counter[str] = field(default_factory=Counter[str])
    missed: list[Missed] = field(default_factory=list[Missed])
    error: float | None = None


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
        sites: Sites found before the pass, apart from its pattern; `None` when it has no site finder.
    """

    id: str
    seconds: float
    nodes: tuple[int, int]
    modified: bool
    stats: PassStats
    rewrites: int = 0
    sites: int | None = None


@dataclass
class Report:
    """What a pipeline did.

    Attributes:
        pipeline: The pipeline as text.
        runs: One entry for each pass that ran.
        warnings: What went wrong without stopping the pipeline, such as a plugin that cannot be imported.
    """

    pipeline: str
    runs: list[PassRun] = field(default_factory=list[PassRun])
    warnings: list[str] = field(default_factory=list[str])

    @property
    def seconds(self) -> float:
        """Wall-clock time of all passes."""
        return sum(r.seconds for r in self.runs)

    def to_json(self) -> dict[str, Any]:
        """Plain data with a schema version, for tools."""
        return {
            "version": REPORT_VERSION,
            "pipeline": self.pipeline,
            "warnings": list(self.warnings),
            "passes": [
                {
                    "id": r.id,
                    "seconds": r.seconds,
                    "nodes": list(r.nodes),
                    "modified": r.modified,
                    "rewrites": r.rewrites,
                    "fired": dict(r.stats.fired),
                    "missed": [{"source": m.source, "reason": m.reason} for m in r.stats.missed],
                    "sites": r.sites,
                    "left": [asdict(m) for m in r.stats.missed],
                    "error": r.stats.error,
                }
                for r in self.runs
            ],
        }
