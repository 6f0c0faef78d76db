"""Which of transformers' models compile and answer as transformers does, on every backend."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.coverage_row import PASSED, Job, Row
from benchmarks.coverage_table import Changes, CoverageTable
from benchmarks.coverage_task import TASKS
from benchmarks.options import Quick
from benchmarks.result import versions


def main(
    task: Annotated[str, typer.Option(help=f"what for: {', '.join(TASKS)}")] = "text-generation",
    only: Annotated[list[str] | None, typer.Option(help="check these architectures, whatever is known of them")] = None,
    jobs: Annotated[int, typer.Option(help="processes at a time")] = 1,
    file: Annotated[list[Path] | None, typer.Option(help="a modelling file that registers architectures")] = None,
    folder: Annotated[Path | None, typer.Option(help="a model folder to check instead, shrunk")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run the code that the folder brings")] = False,
    timeout: Annotated[float, typer.Option(help="seconds for one architecture")] = 300.0,
    memory: Annotated[float, typer.Option(help="GB for one architecture")] = 8.0,
    again: Annotated[bool, typer.Option(help="check those that failed once more")] = False,
    fresh: Annotated[bool, typer.Option(help="forget what is known of this version of transformers")] = False,
    against: Annotated[
        str | None,
        typer.Option(help="compare with what is known of another version", metavar="VERSION"),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="what is known, as JSON; the table stands beside it", show_default="beside this file"),
    ] = None,
    quick: Quick = False,
) -> None:
    """Compile every model that transformers has for a task small, and hold its answers against transformers' own.

    One trace goes through transformers, the onnxruntime session and the AI 100 emulator: prompts of unequal lengths,
    prefill in chunks, decode past the windows. Architectures that are known already on the installed version of
    transformers are not checked again; `--quick` checks two that pass, and writes nothing. `--against` tells what has
    changed since another version, and exits with 1 where something has ceased to pass.
    """
    if task not in TASKS:
        raise typer.BadParameter(f"there is no task '{task}', only {', '.join(TASKS)}")
    if folder is not None and task != "text-generation":
        raise typer.BadParameter("a folder is checked as a causal LM only: leave out --task")
    asked = TASKS[task]
    architectures = asked.coverage().architectures()
    table = CoverageTable(results or asked.results, asked, fresh=fresh)
    known = table.known
    try:
        other = None if against is None else table.of(against)
    except LookupError as error:
        raise typer.BadParameter(str(error)) from error
    files = tuple(f.resolve() for f in file or [])
    if quick:
        seen = next((rows for rows in (known, *table.by_version.values()) if rows), {})
        only = [name for name, row in seen.items() if row.result == PASSED][:2]
    names = list(only or []) or ([folder.name] if folder else architectures)
    todo = [n for n in names if only or folder or n not in known or (again and known[n].result == "fail")]
    limit = int(memory * 1e9)
    work = [Job(n, files, folder.resolve() if folder else None, trust_remote_code, limit, task) for n in todo]
    for row in _run(work, jobs, timeout, asked.module):
        table.add(row)
        if not quick:
            table.write()
    if not quick:
        table.write()
    rows = [known[n] for n in names if n in known]
    missed = [r for r in rows if r.result != PASSED]
    if missed:
        shown = Table("architecture", "reason", title="did not pass", title_justify="left")
        for row in missed:
            shown.add_row(row.architecture, row.reason)
        Console().print(shown)
    print(f"{len(rows) - len(missed)} of {len(rows)} pass on both sessions")
    failed = bool(only and missed)
    if other is not None:
        changes = Changes.between(other, {row.architecture: row for row in rows}, architectures)
        print("\n".join(changes.lines()))
        failed = failed or bool(changes.failing)
    if failed:
        raise typer.Exit(1)


def _run(work: list[Job], jobs: int, timeout: float, module: str) -> Iterator[Row]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.coverage_check", module])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("coverage", total=len(work))
        futures = [pool.submit(_one, context, job, timeout) for job in work]
        for future in as_completed(futures):
            row = future.result()
            progress.update(bar, advance=1, description=f"{row.architecture}: {row.result}")
            yield row


def _one(context: Any, job: Job, timeout: float) -> Row:
    """Check one architecture in a process that may die, hang or take all memory without harm."""
    started = time.monotonic()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    row = Row(job.name, reason=f"took more than {timeout:.0f} s")
    try:
        if ours.poll(timeout):
            row = ours.recv()
    except EOFError:
        row.reason = "the process died, most likely of the memory limit"
    finally:
        process.kill()
        process.join()
    row.transformers = versions()["transformers"]
    row.seconds = round(time.monotonic() - started, 1)
    return row


def _child(job: Job, pipe: Connection) -> None:
    import os

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    if job.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory, job.memory))
    from benchmarks.coverage_check import check

    with tempfile.TemporaryDirectory() as folder:
        pipe.send(check(job, Path(folder)))
