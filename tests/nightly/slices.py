"""One slice of the nightly run: some examples of one property, in a process of its own, counted as they run."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis.statistics import collector

ROOT = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")


@dataclass
class Outcome:
    """What a process reports.

    Attributes:
        examples: Random examples that ran to their end, failing ones included.
        rejected: Draws that were no example.
        tests: Tests that ran.
        exhausted: Of these, how many have no other examples.
        failures: First line of each failure.
        found: Tests that were collected, by property: whether it draws, and its number of cases.
        seconds: Of processor time; set by the parent.
    """

    examples: int = 0
    rejected: int = 0
    tests: int = 0
    exhausted: int = 0
    failures: list[str] = field(default_factory=list[str])
    found: dict[str, tuple[bool, int]] = field(default_factory=dict[str, tuple[bool, int]])
    seconds: float = 0.0


class _Counter:
    """A pytest plugin that fills an outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            name = item.nodeid.partition("[")[0].removesuffix("::runTest")
            file, _, rest = name.partition("::")
            name = f"{Path(file).name}::{rest}"
            drawn = item.get_closest_marker("hypothesis") is not None
            self.outcome.found[name] = drawn, self.outcome.found.get(name, (drawn, 0))[1] + 1

    @pytest.hookimpl(wrapper=True, trylast=True)  # inside hypothesis' own plugin, which listens too
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        listener: Any = collector  # hypothesis types it by its default, None
        told = listener.value

        def count(statistics: Any) -> None:
            cases = statistics.get("generate-phase", {}).get("test-cases", [])
            done = sum(case["status"] in ("valid", "interesting") for case in cases)
            self.outcome.examples += done
            self.outcome.rejected += len(cases) - done
            self.outcome.exhausted += statistics.get("stopped-because") == "nothing left to do"
            if told is not None:
                told(statistics)

        with listener.with_value(count):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcome.tests += report.when == "call"
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
            line = next(iter(message.strip().splitlines()), report.outcome)
            self.outcome.failures.append(f"{report.nodeid.rpartition('::')[2]}: {line}"[:300])


def run(tests: list[str], arguments: list[str], environment: dict[str, str], log: Path) -> Outcome:
    """Run pytest in a fork, which has all that was imported so far.

    Args:
        tests: What to run or to collect.
        arguments: Of pytest, besides.
        environment: Variables to set.
        log: Where its output goes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # In memory, where the system has such a place: examples write and delete many small files.
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        environment = {**environment, "TMPDIR": folder}
        result = Path(folder) / "outcome.json"
        gc.collect()  # a fork has no threads of its parent's sessions, and could not end them
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _child(tests, arguments, environment, log, result)
                code = 0
            finally:
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        known = result.is_file()
        outcome = Outcome(**json.loads(result.read_text())) if known else Outcome()
    if not known:
        outcome.failures.append(f"the process ended with status {status}, see {log}")
    outcome.seconds = usage.ru_utime + usage.ru_stime
    return outcome


def _child(tests: list[str], arguments: list[str], environment: dict[str, str], log: Path, result: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    tempfile.tempdir = None  # so that TMPDIR is read again
    os.chdir(ROOT)
    outcome = Outcome()
    plain = ["-q", "-p", "no:cacheprovider", "--tb=short", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    code = pytest.main([*plain, *arguments, *tests], plugins=[_Counter(outcome)])
    if code not in (0, 1):
        outcome.failures.append(f"pytest ended with {code!r}, see {log}")
    result.write_text(json.dumps(asdict(outcome)))
