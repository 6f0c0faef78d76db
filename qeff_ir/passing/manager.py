"""Runs a pipeline over a module: checked before, verified between, timed, and all or nothing for each pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from qeff_ir.errors import PassError, PipelineError, QeffError, VerificationError
from qeff_ir.module import Module
from qeff_ir.passing.base import Pass, PassStats, Rewriter, registered_passes
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.printer import fingerprint
from qeff_ir.verifier import verify

REPORT_VERSION = 1
"""Version of `Report.to_json`."""


@dataclass(frozen=True)
class PassRun:
    """What one pass of a pipeline did.

    Attributes:
        id: Instance id, for example ``attention#2``.
        seconds: Wall-clock time, verification included.
        nodes: Nodes of the main graph before and after.
        modified: Whether the module's text form changed.
        stats: Rewrites that fired and sites that were missed.
    """

    id: str
    seconds: float
    nodes: tuple[int, int]
    modified: bool
    stats: PassStats


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
                    "fired": dict(r.stats.fired),
                    "missed": [{"source": m.source, "reason": m.reason} for m in r.stats.missed],
                }
                for r in self.runs
            ],
        }


def check_order(pipeline: Pipeline, properties: set[str]) -> None:
    """Check that every pass finds the properties it requires, before anything runs.

    Args:
        pipeline: What is to run.
        properties: What holds of the module before.

    Raises:
        PipelineError: A property is missing; names the pass that destroyed it, or one that would establish it.
    """
    held, destroyed = set(properties), dict[str, str]()
    for name, item in pipeline:
        for missing in sorted(item.requires - held):
            by = f"{destroyed[missing]} destroys it before" if missing in destroyed else "no pass before establishes it"
            makers = [n for n, cls in registered_passes().items() if missing in cls.establishes]
            way = f"; put {' or '.join(makers)} before {name}" if makers else ""
            raise PipelineError(f"{name} requires the property '{missing}', but {by}{way}")
        destroyed |= dict.fromkeys(item.invalidates, name)
        held = (held - item.invalidates) | item.establishes


def run_pipeline(
    module: Module, pipeline: Pipeline, watch: Callable[[str, PassRun | None], None] | None = None
) -> Report:
    """Run every pass of `pipeline` on `module`, in place.

    A pass that fails, breaks a rule of the IR, changes the interface without declaring it, or misses a site although it
    promises all of them, leaves the module as it was before that pass.

    Args:
        module: Changed in place.
        pipeline: What to run.
        watch: Called with ``(id, None)`` before a pass and ``(id, run)`` after it.

    Raises:
        PipelineError: The order of the passes cannot work; nothing ran.
        PassError: A pass failed; the message names it.
    """
    check_order(pipeline, module.properties)
    report = Report(str(pipeline))
    before = fingerprint(module)
    for name, item in pipeline:
        if watch is not None:
            watch(name, None)
        run, before = _run(module, name, item, before)
        report.runs.append(run)
        if watch is not None:
            watch(name, run)
    module.write_facts()
    return report


def _run(module: Module, name: str, item: Pass, before: str) -> tuple[PassRun, str]:
    started, size, snapshot = time.perf_counter(), len(module.graph), module.clone()
    rewriter = Rewriter(module, name)
    try:
        item.run(module, rewriter)
        module.properties = (module.properties - item.invalidates) | item.establishes
        verify(module)
        _check_promises(snapshot, module, item, rewriter.stats)
    except BaseException as error:
        for part in fields(module):
            setattr(module, part.name, getattr(snapshot, part.name))
        if isinstance(error, QeffError):
            raise PassError(f"pass {name}: {error}") from error
        raise
    after = fingerprint(module)
    seconds = time.perf_counter() - started
    return PassRun(name, seconds, (size, len(module.graph)), after != before, rewriter.stats), after


def _check_promises(before: Module, after: Module, item: Pass, stats: PassStats) -> None:
    if not item.changes_interface and _interface(before) != _interface(after):
        changed = sorted(map(str, set(_interface(before)) ^ set(_interface(after))))
        raise VerificationError(
            "contract", f"the interface changed although the pass does not declare it: {', '.join(changed[:4])}"
        )
    if item.all_sites and stats.missed:
        sites = "; ".join(f"{m.source}: {m.reason}" for m in stats.missed[:4])
        more = f"; and {len(stats.missed) - 4} more" if len(stats.missed) > 4 else ""
        raise PassError(f"{len(stats.missed)} sites were not rewritten ({sites}{more})")


def _interface(module: Module) -> list[tuple[str, ...]]:
    values = [("input", v) for v in module.graph.inputs] + [("output", v) for v in module.graph.outputs]
    return [
        *((kind, v.name or "", str(v.dtype), str(v.shape)) for kind, v in values),
        *(("state", str(s)) for s in module.states),
    ]
