"""Runs a pipeline over a module: checked before, verified between, timed, and all or nothing for each pass."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields

import qeff_ir.passing.checks as checks
import qeff_ir.passing.plugins as plugins
from qeff_ir.errors import PassError, PipelineError, QeffError
from qeff_ir.garbage import settled
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import fingerprint, structure
from qeff_ir.passing.base import Pass, Rewriter, registered_passes
from qeff_ir.passing.instrument import Instrument, Watch
from qeff_ir.passing.options import as_text, options
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.report import REPORT_VERSION, PassRun, Report

LEVELS = 5
"""Check levels, 0 to 4."""

__all__ = ["REPORT_VERSION", "PassRun", "Report", "check_order", "run_pipeline"]


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
            makers = [maker for name_, cls in registered_passes().items() for maker in _makers(name_, cls, missing)]
            way = f"; put {' or '.join(makers)} before {name}" if makers else ""
            raise PipelineError(f"{name} requires the property '{missing}', but {by}{way}")
        destroyed |= dict.fromkeys(item.invalidates, name)
        held = (held - item.invalidates) | item.established()


def _makers(name: str, cls: type[Pass], wanted: str) -> Iterator[str]:
    """The pass as a pipeline writes it, where it establishes a property: always, or with one value of an option."""
    if wanted in cls.establishes:
        yield name
        return
    if any(option.default is MISSING for option in options(cls).values()):
        return
    for option in options(cls).values():
        made = {v: wanted in cls(**{option.field: v}).established() for v in option.kinds if isinstance(v, str)}
        if len(set(made.values())) > 1:  # the option decides
            yield from (f"{name}{{{option.name}={as_text(value)}}}" for value, holds in made.items() if holds)


def run_pipeline(
    module: Module,
    pipeline: Pipeline,
    watch: Callable[[str, PassRun | None], None] | None = None,
    *,
    instruments: Sequence[Instrument] = (),
    check: int = 1,
    budgets: Mapping[str, int] | None = None,
) -> Report:
    """Run every pass of `pipeline` on `module`, in place.

    A pass that fails, breaks a rule of the IR, changes the interface without declaring it, or misses a site although it
    promises all of them, leaves the module as it was before that pass.

    Args:
        module: Changed in place.
        pipeline: What to run.
        watch: Called with ``(id, None)`` before a pass and ``(id, run)`` after it.
        instruments: Told of everything, as a stack.
        check: How much is checked after each pass, see `qeff_ir.passing.checks.check`; 0 is nothing, and 4 also drives
            prefill and decode after each pass, and fails the first that changes the numbers.
        budgets: Most rewrites that a pass may make, by instance id.

    Raises:
        PipelineError: The order of the passes cannot work, or there is no such check level; nothing ran.
        PassError: A pass failed; the message names it.
    """
    if check not in range(LEVELS):
        raise PipelineError(f"there is no check level {check!r}: give a number from 0 to {LEVELS - 1}")
    check_order(pipeline, module.properties)
    unknown = sorted(set(budgets or ()) - {id for id, _ in pipeline})
    if unknown:
        raise PipelineError(f"there is a budget for '{unknown[0]}', but no such pass in the pipeline")
    report = Report(str(pipeline), warnings=[f"plugin '{n}': {why}" for n, why in plugins.BROKEN.items()])
    stack = [*([Watch(watch)] if watch is not None else ()), *instruments]
    if check == LEVELS - 1 and not any(instrument.numeric for instrument in stack):
        stack.append(_numeric())
    for instrument in stack:
        instrument.before_pipeline(module, pipeline)
    before, forms = fingerprint(module), {structure(module): "the beginning"} if check >= 2 else {}
    with settled():
        for id, item in pipeline:
            rewriter = Rewriter(module, id, (budgets or {}).get(id))
            run, before = _run(module, item, rewriter, before, stack, check, forms)
            report.runs.append(run)
            gc.collect()
    module.write_facts()
    for instrument in reversed(stack):
        instrument.after_pipeline(report, module)
    return report


def _numeric() -> Instrument:
    """The check of the numbers, imported by name: it drives modules, and lies above the passes."""
    return importlib.import_module("qeff_ir.debug.equivalence").Equivalence()


def _run(
    module: Module,
    item: Pass,
    rewriter: Rewriter,
    before: str,
    stack: Sequence[Instrument],
    check: int,
    forms: dict[str, str],
) -> tuple[PassRun, str]:
    id = rewriter.pass_id
    for instrument in stack:
        instrument.before_pass(id, item, module)
    started, size, snapshot = time.perf_counter(), len(module.graph), module.clone()
    try:
        sites = item.sites(module) if check else []
        item.run(module, rewriter)
        if rewriter.refused:
            rewriter.sweep()  # of what was built for rewrites that were then refused
        rewriter.adopt()
        module.properties = (snapshot.properties - item.invalidates) | item.established()
        checks.check(checks.Transition(item, snapshot, module, rewriter, sites), check)
        _check_undone(module, snapshot, id, forms)
        after = fingerprint(module)
        seconds = time.perf_counter() - started
        sizes = size, len(module.graph)
        found = len(sites) if check and checks.finds_sites(item) else None
        modified = after != before or not checks.same_weights(snapshot, module)
        run = PassRun(id, seconds, sizes, modified, rewriter.stats, rewriter.count, found)
        for instrument in reversed(stack):
            instrument.after_pass(run, module)
    except BaseException as error:
        for part in fields(module):
            setattr(module, part.name, getattr(snapshot, part.name))
        known = PassError(f"pass {id}: {error}") if isinstance(error, QeffError) else error
        for instrument in reversed(stack):
            instrument.failed(id, item, module, known)
        if known is not error:
            raise known from error
        raise
    return run, after


def _check_undone(module: Module, before: Module, id: str, forms: dict[str, str]) -> None:
    """Refuse a pass that brings back the graph of an earlier moment; `forms` names the pass that left each graph."""
    if not forms:
        return
    now, was = structure(module), structure(before)
    if now != was and now in forms:
        raise PassError(f"it undoes {forms[was]}: the graph is again what it was at {forms[now]}; drop one of the two")
    forms[now] = id if now != was else forms[was]
