"""Which of transformers' causal LMs compile and answer as transformers does, on every backend."""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.coverage_row import PASSED, Job, Row
from benchmarks.options import Quick
from benchmarks.result import versions

RESULTS = Path(__file__).parent / "coverage.json"
TABLE = Path(__file__).parent / "coverage.md"


def main(
    only: Annotated[list[str] | None, typer.Option(help="check these architectures, whatever is known of them")] = None,
    jobs: Annotated[int, typer.Option(help="processes at a time")] = 1,
    file: Annotated[list[Path] | None, typer.Option(help="a modelling file that registers architectures")] = None,
    folder: Annotated[Path | None, typer.Option(help="a model folder to check instead, shrunk")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run the code that the folder brings")] = False,
    timeout: Annotated[float, typer.Option(help="seconds for one architecture")] = 300.0,
    memory: Annotated[float, typer.Option(help="GB for one architecture")] = 8.0,
    again: Annotated[bool, typer.Option(help="check those that failed once more")] = False,
    fresh: Annotated[bool, typer.Option(help="forget what is known")] = False,
    results: Annotated[Path, typer.Option(help="what is known, as JSON; the table stands beside it")] = RESULTS,
    quick: Quick = False,
) -> None:
    """Compile every causal LM of transformers small, and hold its answers against transformers' own.

    One trace goes through transformers, the onnxruntime session and the AI 100 emulator: prompts of unequal lengths,
    prefill in chunks, decode past the windows. Architectures that are known already are not checked again; `--quick`
    checks two of them that pass, and writes nothing.
    """
    from benchmarks.coverage_models import architectures

    known = {} if fresh else _read(results)
    files = tuple(f.resolve() for f in file or [])
    if quick:
        only = [name for name, row in known.items() if row.result == PASSED][:2]
    names = list(only or []) or ([folder.name] if folder else architectures())
    todo = [n for n in names if only or folder or n not in known or (again and known[n].result == "fail")]
    limit = int(memory * 1e9)
    work = [Job(n, files, folder.resolve() if folder else None, trust_remote_code, limit) for n in todo]
    for row in _run(work, jobs, timeout):
        known[row.architecture] = row
        if not quick:
            _write(results, known)
    if not quick:
        _write(results, known)
    rows = [known[n] for n in names if n in known]
    missed = [r for r in rows if r.result != PASSED]
    if missed:
        table = Table("architecture", "reason", title="did not pass", title_justify="left")
        for row in missed:
            table.add_row(row.architecture, row.reason)
        Console().print(table)
    print(f"{len(rows) - len(missed)} of {len(rows)} pass on both sessions")
    if only and missed:
        raise typer.Exit(1)


def _run(work: list[Job], jobs: int, timeout: float) -> Iterator[Row]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.coverage_check"])
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


def _read(file: Path) -> dict[str, Row]:
    if not file.is_file():
        return {}
    return {r["architecture"]: Row(**r) for r in json.loads(file.read_text())["rows"]}


def _write(file: Path, known: dict[str, Row]) -> None:
    """JSON and, beside it, the table; each replaced as a whole, so that a run can be stopped at any time."""
    rows = [known[n] for n in sorted(known)]
    data = {"benchmark": "coverage", "versions": versions(), "rows": [asdict(r) for r in rows]}
    _replace(file, json.dumps(data, indent=1) + "\n")
    _replace(file.with_suffix(".md"), _markdown(rows))


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


def _markdown(rows: list[Row]) -> str:
    passed = [r for r in rows if r.result == PASSED]
    within = sum(max(r.error.values()) <= r.bound for r in passed)
    lines = [
        "# Architectures",
        "",
        f"{len(passed)} of {len(rows)} causal LMs of transformers {versions()['transformers']} answer as "
        f"transformers does, on the onnxruntime session and in the AI 100 emulator; {within} of them within the tests' "
        "bound on both.",
        "",
        "Made by `python -m benchmarks coverage`: each architecture small, with random weights, in float32; two "
        "prompts of unequal lengths, prefill in chunks of 8, decode past the windows. `error` is the largest "
        "`max|error| / rms` of the logits on any backend, `bound` what the tests allow (8 units of roundoff times the "
        "root of the matrix products in a row). Untrained weights lose more digits than that in some architectures, in "
        "transformers itself: `limit` is 4 times what transformers differs from itself by, in float64 and with its own "
        "cache, if that is more than the bound, and never more than 16 times the bound. Faults planted in tests show "
        "at 100 times the bound at least, so none of them would pass here.",
        "",
        "| architecture | model | result | error | bound | limit | nodes | states | seconds | reason |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = f"{max(row.error.values()):.1e}" if row.error else ""
        bound, limit = (f"{number:.1e}" if number else "" for number in (row.bound, row.limit))
        reason = row.reason.replace("|", "\\|")
        lines.append(
            f"| {row.architecture} | {row.model} | {row.result} | {error} | {bound} | {limit} | "
            f"{row.nodes or ''} | {row.states or ''} | {row.seconds:.0f} | {reason} |"
        )
    return "\n".join(lines) + "\n"
