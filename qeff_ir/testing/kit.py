"""For authors of passes: hold a pass, and the packages that it is part of, against drawn decoders.

::

    from qeff_ir.testing.kit import hold_package, hold_pass, planted

    def test_it_keeps_its_word():
        hold_pass(FuseGates())

    def test_packages_answer_as_before():
        hold_package(FuseGates(), target="ai100")

    def test_a_fault_is_told():
        with planted(FuseGates.run, "op.Sigmoid(x)", "op.Tanh(x)"), pytest.raises(NotHeldError):
            hold_pass(FuseGates())

``python -m qeff_ir.testing.kit fuse-gates`` does the first two for a pass that is registered.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from backends import backend_names, find_backend
from qeff_ir import numerics
from qeff_ir.arrays import Array
from qeff_ir.errors import PipelineError, QeffError
from qeff_ir.passing.base import Pass
from qeff_ir.passing.manager import PassRun, run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.testing.build import build
from qeff_ir.testing.edits import EditError, planted
from qeff_ir.testing.judge import (
    expected,
    expected_drafts,
    explained,
    module_logits,
    options,
    prepare,
    session_logits,
)
from qeff_ir.testing.recipe import Recipe
from qeff_ir.testing.strategies import Request, recipes, requests

__all__ = ["EditError", "Held", "NotHeldError", "hold_package", "hold_pass", "planted"]


class NotHeldError(QeffError):
    """A pass does not keep its word on a decoder, or did nothing on all of them; notes show the smallest one."""


@dataclass
class Held:
    """What the examples have exercised.

    Attributes:
        decoders: Number of decoders.
        changed: Those that the pass has changed.
        fired: Rewrites by name.
        missed: Sites that it left alone, by reason.
    """

    decoders: int = 0
    changed: int = 0
    fired: Counter[str] = field(default_factory=Counter[str])
    missed: Counter[str] = field(default_factory=Counter[str])

    def count(self, run: PassRun) -> None:
        """Add what the pass did on one more decoder."""
        self.decoders += 1
        self.changed += run.modified
        self.fired.update(run.stats.fired)
        self.missed.update(missed.reason for missed in run.stats.missed)

    def __str__(self) -> str:
        """One line."""
        parts = [f"{self.decoders} decoders, {self.changed} changed"]
        for name, counts in (("fired", self.fired), ("left alone", self.missed)):
            if counts:
                parts.append(f"{name}: " + ", ".join(f"{what} ({n})" for what, n in counts.most_common()))
        return "; ".join(parts)


_Example = Callable[[Recipe, Request, Held], None]


def hold_pass(
    item: Pass | str,
    *,
    target: str = "onnxruntime",
    pipeline: Pipeline | None = None,
    examples: int = 25,
    shrink: bool = True,
    seen: Callable[[int], None] | None = None,
) -> Held:
    """Run a pass in its place in a target's pipeline on drawn decoders, and hold it to all that it declares.

    That is check level 3 of the manager, and the numbers: what the module answers before and after the pass keeps its
    declared promise (`Pass.numeric`), with answers in double precision as the third party.

    Args:
        item: The pass, or a text (``fuse-gates{alpha=2}``). It stands where the target has one of that name, else at
            the end of its phase.
        target: Whose pipeline.
        pipeline: Another pipeline for the target, in which the pass stands.
        examples: Number of decoders; they are the same at each call.
        shrink: Whether to look for the smallest decoder that shows a fault, which takes longer than to find one.
        seen: Called with the number of decoders so far.

    Returns:
        What was exercised.

    Raises:
        NotHeldError: It does not hold, or the pass changed no decoder.
        PipelineError: `item` is a text that cannot be read, or is not one pass; `pipeline` is without it.
        ValueError: `examples` is less than 1.
    """
    before, made, _ = _placed(item, target, pipeline)

    def one(recipe: Recipe, request: Request, held: Held) -> None:
        module = prepare(build(recipe).module, request)
        start, depth, until = module.clone(), numerics.depth(module), Pipeline((*before.passes, made))
        with explained(f"pass {made.name}", module, pipeline=str(until), recipe=recipe, request=request):
            run_pipeline(module, before)
            given_before, drafts_before = module_logits(module, request, start)
            (run,) = run_pipeline(module, Pipeline((made,)), check=3).runs
            held.count(run)
            if run.modified:
                after, drafts = module_logits(module, request, start)
                seen_all = [numerics.Observed(given_before, after, expected(recipe, request), depth)]
                if both := sorted(drafts_before.keys() & drafts.keys()):
                    before_both, after_both = (np.stack([d[at] for at in both]) for d in (drafts_before, drafts))
                    exact = expected_drafts(recipe, request, both)
                    seen_all.append(numerics.Observed(before_both, after_both, exact, depth))
                problem = next((p for s in seen_all if (p := made.numeric.problem(s)) is not None), None)
                if problem is not None:
                    raise NotHeldError(problem)

    return _hold(made.name, one, examples, shrink, seen)


def hold_package(
    item: Pass | str,
    *,
    target: str = "onnxruntime",
    pipeline: Pipeline | None = None,
    examples: int = 10,
    shrink: bool = True,
    seen: Callable[[int], None] | None = None,
) -> Held:
    """Emit drawn decoders by a target's pipeline with a pass in it, and hold their answers to those of the decoder.

    Args, Returns, Raises:
        See `hold_pass`. A package of the AI 100 runs in the emulator.
    """
    before, made, after = _placed(item, target, pipeline)
    backend = find_backend(target)

    def one(recipe: Recipe, request: Request, held: Held) -> None:
        module = prepare(build(recipe).module, request)
        depth, whole = numerics.depth(module), Pipeline((*before.passes, made, *after.passes))
        with (
            explained(f"package {made.name}", module, pipeline=str(whole), recipe=recipe, request=request),
            tempfile.TemporaryDirectory() as folder,
        ):
            held.count(run_pipeline(module, whole).runs[len(before.passes)])
            backend.check(module, options(request))
            backend.emit(module, Path(folder), options(request))
            answers, drafts = session_logits(backend.open(Path(folder), threads=1), request)
            _within(answers, expected(recipe, request), depth)
            if drafts:
                _within(np.stack([*drafts.values()]), expected_drafts(recipe, request, drafts), depth)

    return _hold(made.name, one, examples, shrink, seen)


def _placed(item: Pass | str, target: str, pipeline: Pipeline | None) -> tuple[Pipeline, Pass, Pipeline]:
    """The passes before the pass, the pass, and those after it."""
    own = Pipeline.parse(find_backend(target).pipeline) if pipeline is None else pipeline
    given_passes = Pipeline.parse(item).passes if isinstance(item, str) else (item,)
    if len(given_passes) != 1:
        raise PipelineError(f"'{item}' has {len(given_passes)} passes: give one")
    (made,) = given_passes
    place = next((i for i, other in enumerate(own.passes) if other.name == made.name), None)
    if place is not None:
        return Pipeline(own.passes[:place]), made, Pipeline(own.passes[place + 1 :])
    if pipeline is not None:
        raise PipelineError(f"the pipeline has no pass {made.name}: put it where it belongs")
    whole = own.add(made).passes
    place = next(i for i, other in enumerate(whole) if other is made)
    return Pipeline(whole[:place]), made, Pipeline(whole[place + 1 :])


def _within(answers: Array, exact: Array, depth: int) -> None:
    error, limit = numerics.error_over_rms(answers, exact), numerics.bound(depth)
    if error > limit:
        raise NotHeldError(f"the error is {error:.2e} of the rms of the answers, of {limit:.2e} allowed")


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Recipe, Request]:
    recipe = draw(recipes(odd=None) if draw(st.integers(0, 2)) == 2 else recipes())
    return recipe, draw(requests(recipe))


def _hold(name: str, one: _Example, examples: int, shrink: bool, seen: Callable[[int], None] | None) -> Held:
    if examples < 1:
        raise ValueError(f"examples must be at least 1, not {examples}")
    held = Held()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=[HealthCheck.too_slow],
        report_multiple_bugs=False,
    )
    @given(_cases())
    def hold(case: tuple[Recipe, Request]) -> None:
        one(*case, held)
        if seen is not None:
            seen(held.decoders)

    try:
        hold()
    except Exception as error:
        raise NotHeldError(f"{name} does not hold: {error}") from error
    if not held.changed:
        left = f"; {held}" if held.missed else ""
        raise NotHeldError(f"{name} changed none of {held.decoders} decoders: nothing was tried{left}")
    return held


@contextmanager
def _progress(text: str, total: int) -> Generator[Callable[[int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    about = "Hold a pass, and the packages that it is part of, against drawn decoders."
    parser = argparse.ArgumentParser("python -m qeff_ir.testing.kit", description=about)
    parser.add_argument("item", metavar="PASS", help="a registered pass, with its options if any")
    parser.add_argument("--target", action="append", choices=backend_names(), help="one or several; all by default")
    parser.add_argument("--examples", type=int, default=25, help="decoders for each target (25)")
    given_ = parser.parse_args(arguments)
    if given_.examples < 1:
        parser.error(f"--examples must be at least 1, not {given_.examples}")
    try:
        for target in given_.target or backend_names():
            for what, hold in (("the pass", hold_pass), ("packages", hold_package)):
                with _progress(f"{what} on {target}", given_.examples) as seen:
                    held = hold(given_.item, target=target, examples=given_.examples, seen=seen)
                print(f"{target}: {what} held on {held}")
    except QeffError as error:
        print("\n".join([str(error), *getattr(error.__cause__, "__notes__", ())]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
