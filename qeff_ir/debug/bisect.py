"""Find the guilty pass, and the guilty rewrite within it, by running less and less of a pipeline.

The oracle says whether a module is bad: the failure that the bundle tells of, the numeric check against the module
before the pipeline, or a command of the user's. A pass that fails may be the victim of one before it: unless every pass
was held against its input already (check level 4), the numbers of the passes before it are asked first.

The search over passes is binary, for what one pass spoils the next ones seldom mend; the search over the rewrites of
one pass sets a `Rewriter` budget: the first number of rewrites that fails is the guilty one.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qeff_ir.debug.bundle import Bundle
from qeff_ir.debug.diff import ModuleDiff, diff
from qeff_ir.debug.equivalence import EndToEnd
from qeff_ir.debug.first_difference import Difference, first_difference
from qeff_ir.debug.replay import NUMERIC, Failure, attempt, failing_pass, recorded
from qeff_ir.errors import BundleError, EquivalenceError, PassError, QeffError
from qeff_ir.ir.module import Module
from qeff_ir.ir.snapshot import save_module
from qeff_ir.passing.instrument import Instrument
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.passing.report import Report

Say = Callable[[str], None]
_MOST = 1 << 20
"""Rewrites after which a pass is taken to have no end."""


@dataclass(frozen=True)
class Culprit:
    """What bisection found.

    Attributes:
        pass_id: The guilty pass.
        failure: How it fails.
        rewrite: Number of the guilty rewrite, from 1; `None` when it is none of them: the pass fails without any, or
            for what it left undone.
        rule: Name of the rewrite.
        whole: Whether no rewrite is wrong by itself, but the result is not what the pass promises: a site is left, say.
        change: What that rewrite changed; `None` when the pass raised in it, so that nothing is left to look at.
        difference: Where the numbers differ first; `None` when they do not, or cannot be told.
    """

    pass_id: str
    failure: Failure
    rewrite: int | None = None
    rule: str = ""
    whole: bool = False
    change: ModuleDiff | None = None
    difference: Difference | None = None

    def __str__(self) -> str:
        if self.whole:
            return f"{self.pass_id} as a whole, none of its rewrites: {self.failure.message}"
        if self.rewrite is None:
            return f"{self.pass_id} fails before its first rewrite: {self.failure.message}"
        where = f" in {', '.join(self.sources)}" if self.sources else ""
        return f"{self.pass_id}, rewrite {self.rewrite} ({self.rule}){where}: {self.failure.message}"

    @property
    def sources(self) -> list[str]:
        """Hugging Face modules whose nodes the guilty rewrite made or re-wired."""
        changes = self.change.nodes if self.change is not None else ()
        return sorted({source for c in changes if c.kind == "added" for source in c.sources})


def bisect(bundle: Bundle, *, command: str | None = None, say: Say = lambda _: None) -> Culprit:
    """Find what makes a bundle fail.

    Args:
        bundle: From a failed run.
        command: Run as ``COMMAND FOLDER`` through the shell on a saved module; a code other than 0 says that it is bad.
            It stands for the bundle's own failure.
        say: Told of each trial.

    Raises:
        BundleError: Nothing fails here.
        PipelineError: A pass is not known here.
    """
    data = bundle.metadata
    if command is not None:
        return _by_command(bundle.start, bundle.pipeline, command, say)
    one = failing_pass(bundle)
    earlier = _earlier(bundle, say) if data.check < NUMERIC else None
    if earlier is not None:
        return earlier
    (inner, _), *_ = one
    return _rewrite(bundle.module, one, inner, data.pass_id, _same(recorded(bundle), data.check, data.seed), say)


def _earlier(bundle: Bundle, say: Say) -> Culprit | None:
    """The first pass before the failing one that changes the numbers, if one does."""
    name, whole = bundle.metadata.pass_id, bundle.pipeline
    ids = [id for id, _ in whole]
    before = Pipeline(whole.passes[: ids.index(name)] if name in ids else ())
    if not before.passes:
        return None
    oracle = _numeric(bundle.metadata.seed)
    bad = oracle(bundle.start, before, None) is not None
    say(f"the numbers before {name}: {'bad' if bad else 'good'}")
    if not bad:
        return None
    say(f"{name} may be a victim: bisect again once the pass found here is mended")
    return _search(bundle.start, before, oracle, say)


Oracle = Callable[[Module, Pipeline, "dict[str, int] | None"], Failure | None]
"""Runs a pipeline on a copy of a module; tells the failure that is looked for, or `None`."""


def _same(was: Failure, check: int, seed: int) -> Oracle:
    def oracle(module: Module, pipeline: Pipeline, budgets: dict[str, int] | None) -> Failure | None:
        now = attempt(module, pipeline, check, seed=seed, budgets=budgets)
        return now if was.like(now) else None

    return oracle


def _numeric(seed: int) -> Oracle:
    """Whether a pipeline changes the numbers; one whose module cannot be driven tells nothing."""
    check = EndToEnd(seed)

    def oracle(module: Module, pipeline: Pipeline, budgets: dict[str, int] | None) -> Failure | None:
        failure = attempt(module, pipeline, 0, budgets=budgets, instruments=[check])
        return failure if failure is not None and failure.error == EquivalenceError.__name__ else None

    return oracle


def _commanded(command: str) -> Oracle:
    def oracle(module: Module, pipeline: Pipeline, budgets: dict[str, int] | None) -> Failure | None:
        kept = _Keep()
        failure = attempt(module, pipeline, 0, budgets=budgets, instruments=[kept])
        if failure is not None or kept.module is None:
            return failure
        with tempfile.TemporaryDirectory(prefix="qeff-bisect-") as folder:
            save_module(kept.module, Path(folder))
            line = f"{command} {shlex.quote(folder)}"
            done = subprocess.run(line, shell=True, check=False, capture_output=True)  # the user's own command
        last = [id for id, _ in pipeline][-1:]
        message = f"the command fails with code {done.returncode}"
        return Failure(last[0] if last else "(start)", "command", "", message) if done.returncode else None

    return oracle


class _Keep(Instrument):
    """Keeps the result of a pipeline."""

    module: Module | None = None

    def after_pipeline(self, report: Report, module: Module) -> None:
        self.module = module


def _by_command(start: Module, pipeline: Pipeline, command: str, say: Say) -> Culprit:
    oracle = _commanded(command)
    if oracle(start, Pipeline(), None) is not None:
        raise BundleError("the command fails already on the module before the pipeline: no pass is guilty")
    if oracle(start, pipeline, None) is None:
        raise BundleError("the command accepts the result of the whole pipeline: there is nothing to find")
    return _search(start, pipeline, oracle, say)


def _search(start: Module, pipeline: Pipeline, oracle: Oracle, say: Say) -> Culprit:
    """The pass, and the rewrite in it, that turns a good module bad; the whole pipeline does."""
    passes, ids = pipeline.passes, [id for id, _ in pipeline]
    good, bad = 0, len(passes)
    while bad - good > 1:
        middle = (good + bad) // 2
        failure = oracle(start, Pipeline(passes[:middle]), None)
        say(f"the first {middle} passes, up to {ids[middle - 1]}: {'bad' if failure else 'good'}")
        good, bad = (good, middle) if failure else (middle, bad)
    guilty = ids[bad - 1]
    return _rewrite(start, Pipeline(passes[:bad]), guilty, guilty, oracle, say)


def _rewrite(module: Module, pipeline: Pipeline, inner: str, name: str, oracle: Oracle, say: Say) -> Culprit:
    """The guilty rewrite of the last pass that matters, called `inner` in this pipeline and `name` in the whole."""
    failure = oracle(module, pipeline, None)
    if failure is None:
        raise BundleError(f"{name} does not fail here as the bundle says: run 'qeff replay' to see what it does")

    def bad(budget: int) -> bool:
        found = oracle(module, pipeline, {inner: budget}) is not None
        say(f"{name} with {budget} rewrite{'s' * (budget != 1)}: {'bad' if found else 'good'}")
        return found

    if bad(0):
        return Culprit(name, failure)
    good, limit = 0, 1
    while not bad(limit):
        good, limit = limit, limit * 2
        if limit > _MOST:
            raise BundleError(f"{name} fails only without a budget: it changes the graph past its rewriter")
    while limit - good > 1:
        middle = (good + limit) // 2
        good, limit = (good, middle) if bad(middle) else (middle, limit)
    return _witness(module, pipeline, inner, name, failure, limit)


def _witness(module: Module, pipeline: Pipeline, inner: str, name: str, failure: Failure, number: int) -> Culprit:
    """Name the rewrite, by what the pass counts and makes with it and without it."""
    without, with_it = (_apply(module, pipeline, inner, budget) for budget in (number - 1, number))
    if failure.error == PassError.__name__ and with_it[0] is not None and not with_it[2]:
        return Culprit(name, failure, whole=True)  # the pass came to its end; the manager asked for more
    rules = [rule for rule, count in with_it[1].items() if count > without[1].get(rule, 0)]
    rule = rules[0] if rules else "unnamed"
    if without[0] is None or with_it[0] is None:
        return Culprit(name, failure, number, rule)
    return Culprit(name, failure, number, rule, False, diff(without[0], with_it[0]), _parting(without[0], with_it[0]))


def _parting(before: Module, after: Module) -> Difference | None:
    try:
        return first_difference(before, after)
    except QeffError:
        return None  # what cannot be driven has no numbers, and need not have any to be wrong


def _apply(module: Module, pipeline: Pipeline, inner: str, budget: int) -> tuple[Module | None, dict[str, int], bool]:
    """Result and counters of the pass `inner` under a budget, without checks, and whether it wanted more."""
    from qeff_ir.passing.rewriter import Rewriter

    copy = module.clone()
    for id, item in pipeline:
        rewriter = Rewriter(copy, id, budget if id == inner else None)
        try:
            item.run(copy, rewriter)
        except Exception:  # the oracle has seen and described it; here only how far the pass came is asked
            return None, dict(rewriter.stats.fired), rewriter.refused
        rewriter.sweep()
        if id == inner:
            return copy, dict(rewriter.stats.fired), rewriter.refused
    return copy, {}, False
