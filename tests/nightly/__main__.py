"""Run the slices that are left, what failed first, then least processor time first; write the record after each."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.nightly.record import Property, Record, Slice
from tests.nightly.slices import ROOT, run

RECORD = Path(__file__).with_name("record.json")
IMPORTED = (
    "hypothesis.stateful", "onnxruntime", "onnxscript.optimizer", "onnxscript.rewriter", "onnxscript.version_converter",
    "torch.export", "torch.onnx", "transformers.exporters.exporter_onnx", "qeff_ir.compiler", "qeff_ir.testing.judge",
)  # fmt: skip
"""What slices need, imported once before the processes part. None of the tests: their profile is a slice's own."""


def commit(record: Path = RECORD) -> str:
    """Of the source, ``+`` behind it when there are changes besides the record."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    mine = [f":!{record.relative_to(ROOT).with_suffix(end)}" for end in (".json", ".md")]
    changed = subprocess.run([*git, "status", "--porcelain", "--", ".", *mine], capture_output=True, text=True).stdout
    return (head or "unknown") + ("+" if changed.strip() else "")


def versions() -> dict[str, str]:
    """Of Python, hypothesis and the libraries."""
    import hypothesis

    from qeff_ir.debug.bundle import versions as libraries

    return {"python": sys.version.split()[0], "hypothesis": hypothesis.__version__, **libraries()}


def main() -> int:
    """See the package."""
    parser = argparse.ArgumentParser(prog="python -m tests.nightly", description=__doc__)
    parser.add_argument("--examples", type=int, default=5000, help="examples that each property is to have")
    parser.add_argument("--slice", type=int, default=500, help="examples of one process")
    parser.add_argument("--minutes", type=float, help="start no slice after so long")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="properties, by file::name or a part of it")
    parser.add_argument("--anew", action="store_true", help="forget what the record knows")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record lies")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "properties", help="where the properties lie")
    parser.add_argument("--output", type=Path, default=ROOT / ".nightly", help="for reports and bundles of failures")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in IMPORTED:
        importlib.import_module(module)
    record = Record(given.examples, versions())
    if given.record.is_file() and not given.anew:
        record = Record.load(given.record)
        if record.versions != versions():
            parser.error(f"{given.record} is of other versions of the libraries: start again with --anew")
        record.target = given.examples
    known = run([str(given.tests)], ["--collect-only"], {}, given.output / "collect.log")
    if known.failures or not known.found:
        parser.error(f"the properties cannot be collected: {known.failures}")
    for name, (drawn, cases) in known.found.items():
        old = record.properties.get(name)
        record.properties[name] = Property(drawn, cases, old.slices if old is not None else [])
    for name in record.properties.keys() - known.found.keys():
        del record.properties[name]
    names = [n for n in known.found if given.only is None or any(part in n for part in given.only)]
    if not names:
        parser.error("no property has such a name")
    return _run(record, names, given)


def _run(record: Record, names: list[str], given: argparse.Namespace) -> int:
    """Slice after slice of the property that has had least time; a property that fails is left until the next call."""
    started, at, failed = time.monotonic(), commit(), set[str]()
    total = sum(record.properties[n].left(record.target) for n in names)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        while True:
            open_ = [n for n in names if n not in failed and record.properties[n].left(record.target)]
            late = given.minutes is not None and time.monotonic() - started > 60 * given.minutes
            if not open_ or late:
                break
            known = record.properties
            name = min(open_, key=lambda n: (known[n].drawn, not known[n].failing, known[n].seconds))
            item = record.properties[name]
            bar.update(task, description=name)
            done = _slice(given, name, item, min(given.slice, item.left(record.target)), at)
            item.slices.append(done)
            if done.failures:
                failed.add(name)
            elif item.drawn and not done.examples:
                raise SystemExit(f"{name} ran no example")
            record.save(given.record)
            bar.update(task, completed=total - sum(record.properties[n].left(record.target) for n in names))
            state = f"FAILED {done.failures[0]}" if done.failures else f"{done.examples} examples"
            print(f"{name} seed {done.seed}: {state} ({done.seconds:.0f} s)", flush=True)
    for name in sorted(n for n in names if record.properties[n].failing):
        print(f"failing: {name}: {'; '.join(record.properties[name].slices[-1].failures)}")
    left = [n for n in names if record.properties[n].left(record.target)]
    print(f"{len(names) - len(left)} of {len(names)} properties are done and clean; the record is {given.record}")
    return 1 if any(record.properties[n].failing for n in names) else 0


def _slice(given: argparse.Namespace, name: str, item: Property, examples: int, at: str) -> Slice:
    seed = random.SystemRandom().randrange(2**32)
    each = -(-examples // item.cases)
    folder = given.output / f"{name.replace('::', '-')}-{seed}"
    environment = {
        "HYPOTHESIS_PROFILE": "nightly", "QEFF_EXAMPLES": str(each), "QEFF_BUNDLES": str(folder / "bundles")
    }  # fmt: skip
    log = given.output / "logs" / f"{folder.name}.txt"
    out = run([str(given.tests / name)], [f"--hypothesis-seed={seed}"], environment, log)
    if out.failures:
        folder.mkdir(parents=True, exist_ok=True)
        log.replace(folder / "report.txt")
    else:
        log.unlink()
    seconds, exhausted = round(out.seconds, 1), out.exhausted == out.tests
    return Slice(seed, out.examples, out.rejected, out.tests, seconds, at, tuple(out.failures), exhausted)


if __name__ == "__main__":
    sys.exit(main())
