"""Whether a module, or a session on a package, answers a request as its recipe does, and a report when it does not.

Answers are the logits of every row's last real token after every run, stacked ``[answers, vocab]``, so that one
comparison covers all of a request: chunks, padding, rows that idle, rows that start anew, edges of windows and caches.
Drafts are the logits of the token before the last, which every second run asks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import numpy as np

from backends.options import CompileOptions
from qeff_ir.arrays import Array
from qeff_ir.debug.bundle import Metadata, describe, versions, write_bundle
from qeff_ir.debug.drive import Plan, drive, tables_of
from qeff_ir.errors import RuntimeInputError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import KEPT_LOGITS, LOGITS, Run, name_of
from qeff_ir.ir.printer import to_text
from qeff_ir.runtime.runs import fitted, logits_of
from qeff_ir.runtime.session import Session
from qeff_ir.specialize import specialize
from qeff_ir.testing.recipe import Recipe, answer
from qeff_ir.testing.strategies import Request

Place = tuple[int, int]
"""A run of a request, by its number, and a row."""
Drafts = dict[Place, Array]
"""Logits ``[vocab]`` of the token before the last."""
BUNDLES_VARIABLE = "QEFF_BUNDLES"
"""Environment variable: folder in which bundles of failures are put."""


def options(request: Request) -> CompileOptions:
    """What a module must be compiled for to take a request."""
    return CompileOptions(prefill_seq_len=request.chunk, ctx_len=request.ctx_len, batch_size=request.batch)


def prepare(module: Module, request: Request) -> Module:
    """Give a module the specializations of a request; returns it."""
    specialize(module, options(request))
    return module


def expected(recipe: Recipe, request: Request) -> Array:
    """The answers in double precision, by the recipe alone."""
    return answered(request, lambda row: answer(recipe, row))


def answered(request: Request, whole: Callable[[Sequence[int]], Array]) -> Array:
    """The answers by a function from a row to the logits of all its tokens, ``[tokens, vocab]``."""
    rows = [row for _, rows, _ in request.feeds() for row in rows if row is not None]
    longest: dict[tuple[int, ...], Array] = {}
    for row in sorted(map(tuple, rows), key=len, reverse=True):  # the answer to a prefix is part of that to the whole
        if not any(known[: len(row)] == row for known in longest):
            longest[row] = whole(row)
    return np.stack([next(a[len(r) - 1] for k, a in longest.items() if list(k[: len(r)]) == r) for r in rows])


def expected_drafts(recipe: Recipe, request: Request, places: Iterable[Place]) -> Array:
    """The drafts at some places in double precision, by the recipe alone."""
    rows = [rows for _, rows, _ in request.feeds()]
    return np.stack([answer(recipe, rows[run][row] or ())[-2] for run, row in places])


def module_answers(module: Module, request: Request, start: Module | None = None) -> Array:
    """The answers alone of `module_logits`."""
    return module_logits(module, request, start)[0]


def module_logits(module: Module, request: Request, start: Module | None = None) -> tuple[Array, Drafts]:
    """The answers of a module's graph as it is, ONNX Runtime's own rewriting off, and the drafts that it returns.

    Args:
        module: The module.
        request: What it is asked.
        start: The module before any pass: it has the tables that the host looks tokens up in, where a pass left that to
            the host; `module` by default.

    Raises:
        RuntimeInputError: ONNX Runtime cannot load or run the graph.
    """
    runs = [_asked(number, run) for number, (run, _, _) in enumerate(request.feeds())]
    given = drive(module, Plan({}, runs, tables=tables_of(start or module)))
    drafts: Drafts = {}
    for number, (run, found) in enumerate(zip(runs, given.drafts, strict=True)):
        if found is not None:
            live = [row for row in range(request.batch) if (run.positions[row] >= 0).any()]
            drafts |= {(number, row): found[live.index(row), -1] for row in _drafted(run)}
    return np.concatenate([run[name_of(LOGITS)] for run in given.outputs]), drafts


def session_answers(session: Session, request: Request, **fields: Array) -> Array:
    """The answers alone of `session_logits`."""
    return session_logits(session, request, **fields)[0]


def session_logits(session: Session, request: Request, **fields: Array) -> tuple[Array, Drafts]:
    """The answers of an open session, which is reset first, and the drafts that it takes.

    Args:
        session: The session.
        request: What it is asked.
        fields: Of every `qeff_ir.ir.ports.Run`.
    """
    session.reset()
    found: list[Array] = []
    drafts: Drafts = {}
    takes_drafts = any(port.role is KEPT_LOGITS for port in session.interface.inputs)
    for number, (run, rows, reset) in enumerate(request.feeds()):
        if reset:
            session.reset()
        given = dataclasses.replace(run, **fields)
        if takes_drafts and _fits(session, asked := _asked(number, given)):
            given = asked
        logits = logits_of(session, given)
        found += [logits[i, -1] for i, row in enumerate(rows) if row is not None]
        drafts |= {(number, row): logits[row, -2] for row in _drafted(given)}
    return np.stack(found), drafts


def _asked(number: int, run: Run) -> Run:
    """The run as it is asked for drafts, every second time: other shapes may be compiled for those."""
    return dataclasses.replace(run, keep=2) if number % 2 and run.tokens.shape[1] > 1 else run


def _drafted(run: Run) -> list[int]:
    """Rows whose token before the last is in the run, where that is asked for."""
    return [row for row, n in enumerate((run.positions >= 0).sum(axis=1)) if n >= run.keep > 1]


def _fits(session: Session, run: Run) -> bool:
    try:
        fitted(run, session.interface.inputs, session.specializations)
    except RuntimeInputError:
        return False
    return True


@contextlib.contextmanager
def explained(
    property_name: str,
    module: Module,
    *,
    pipeline: str = "",
    recipe: Recipe | None = None,
    request: Request | None = None,
) -> Generator[None]:
    """Add to whatever error is raised inside: the module as text, the pipeline, the request, and a bundle of all of it.

    Args:
        property_name: What failed; names the bundle, which replaces that of an earlier, larger example.
        module: Before the pipeline.
        pipeline: What was run on it.
        recipe: What the module was made from.
        request: What it was asked.
    """
    start = module.clone()
    try:
        yield
    except Exception as error:
        lines = [
            f"{property_name} does not hold of this module:",
            to_text(start, origins=False),
            f"pipeline: {pipeline or '(none)'}",
            f"recipe:   {recipe}",
            f"request:  {request}",
            f"error:    {type(error).__name__}: {error}",
        ]
        folder = Path(os.environ.get(BUNDLES_VARIABLE, ".hypothesis/bundles")) / property_name.replace(" ", "-")
        with contextlib.suppress(Exception):  # a bundle that cannot be written must not hide what failed
            kind, code = describe(error)
            data = Metadata(pipeline.split(",")[0], pipeline, pipeline, 4, 0, kind, code, str(error), versions())
            lines.append(f"bundle:   {write_bundle(folder, data, start, start, None)}")
        error.add_note("\n".join(lines))
        raise
