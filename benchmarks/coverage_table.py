"""What is known of architectures on each version of transformers: kept as JSON, shown as a table, compared.

A row is known by its architecture and the version that it was seen on, so that another version adds rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from benchmarks.coverage_row import PASSED, Row
from benchmarks.coverage_task import TEXT_GENERATION, CoverageTask
from benchmarks.result import versions

Rows = dict[str, Row]
"""Rows of one version, by architecture."""


class CoverageTable:
    """The rows of a file.

    Args:
        file: JSON; it need not exist. The table for people stands beside it.
        task: What its rows were checked as.
        fresh: Whether to forget what the file says of the installed version.
    """

    def __init__(self, file: Path, task: CoverageTask = TEXT_GENERATION, *, fresh: bool = False) -> None:
        self.file, self.task = file, task
        self.installed = versions()["transformers"]
        self.by_version: dict[str, Rows] = {}
        for values in json.loads(file.read_text())["rows"] if file.is_file() else []:
            row = Row(**values)
            if not (fresh and row.transformers == self.installed):
                self.add(row)
        self.by_version.setdefault(self.installed, {})

    @property
    def known(self) -> Rows:
        """Those of the installed version."""
        return self.by_version[self.installed]

    def add(self, row: Row) -> None:
        """Put a row in, or in the place of the same architecture's on the same version."""
        self.by_version.setdefault(row.transformers, {})[row.architecture] = row

    def of(self, version: str) -> Rows:
        """Rows of a version; ``5.23`` also means 5.23.0, or the last of several.

        Raises:
            LookupError: There are none, or the version is the installed one.
        """
        have = [v for v in sorted(self.by_version, key=_number) if self.by_version[v] and v != self.installed]
        found = [v for v in have if v == version or v.startswith(version + ".")]
        if not found:
            raise LookupError(
                f"{self.file} has rows of no transformers {version} besides the installed {self.installed}, only of "
                f"{', '.join(have) or 'none'}"
            )
        return self.by_version[found[-1]]

    def write(self) -> None:
        """Replace each file as a whole, so that a run can be stopped at any time."""
        rows = sorted(
            (row for rows in self.by_version.values() for row in rows.values()),
            key=lambda row: (row.architecture, _number(row.transformers)),
        )
        data = {"benchmark": "coverage", "versions": versions(), "rows": [asdict(row) for row in rows]}
        _replace(self.file, json.dumps(data, indent=1) + "\n")
        _replace(self.file.with_suffix(".md"), _markdown(rows, self.task))


@dataclass(frozen=True)
class Changes:
    """What another version changes, by architecture.

    Attributes:
        failing: Pass there and not here.
        passing: Pass here and not there.
        new: Are not there, and what became of them here.
        gone: Are not here.
    """

    failing: tuple[Row, ...]
    passing: tuple[Row, ...]
    new: tuple[Row, ...]
    gone: tuple[str, ...]

    @classmethod
    def between(cls, there: Mapping[str, Row], here: Mapping[str, Row], installed: Iterable[str]) -> Changes:
        """Compare what both know.

        Args:
            there: Rows of another version.
            here: Rows of the installed one.
            installed: All architectures of the installed one.
        """
        both = [(there[name], row) for name, row in sorted(here.items()) if name in there]
        return cls(
            tuple(row for old, row in both if old.result == PASSED != row.result),
            tuple(row for old, row in both if old.result != PASSED == row.result),
            tuple(row for name, row in sorted(here.items()) if name not in there),
            tuple(sorted(set(there) - set(here) - set(installed))),
        )

    def lines(self) -> list[str]:
        """For a terminal."""
        shown = {"newly failing": self.failing, "newly passing": self.passing, "new": self.new}
        return [
            *(
                f"{title}: {row.architecture}: {row.result}{', ' if row.reason else ''}{row.reason}"
                for title, rows in shown.items()
                for row in rows
            ),
            *(f"gone: {name}" for name in self.gone),
            f"{len(self.failing)} newly failing, {len(self.passing)} newly passing, {len(self.new)} new, "
            f"{len(self.gone)} gone",
        ]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _flag(task: CoverageTask) -> str:
    return "" if task is TEXT_GENERATION else f" --task {task.name}"


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


def _markdown(rows: list[Row], task: CoverageTask) -> str:
    """One line for each architecture and result: the figures are of the last version that it was seen on."""
    lines = ["# Architectures", ""]
    for version in sorted({row.transformers for row in rows}, key=_number, reverse=True):
        seen = [row for row in rows if row.transformers == version]
        passed = [row for row in seen if row.result == PASSED]
        within = sum(max(row.error.values()) <= row.bound for row in passed)
        lines += [
            f"{len(passed)} of {len(seen)} {task.subject} of transformers {version} answer as transformers does, on "
            f"the onnxruntime session and in the AI 100 emulator; {within} of them within the tests' bound on both.",
            "",
        ]
    lines += [
        f"Made by `python -m benchmarks coverage{_flag(task)}`: each architecture small, with random weights, in "
        f"float32; {task.trace}. `transformers` says on which "
        "versions a row was seen, and its figures are of the last of them. `error` is the largest `max|error| / rms` "
        "of the logits on any backend, `bound` what the tests allow (8 units of roundoff times the root of the matrix "
        "products in a row). Untrained weights lose more digits than that in some architectures, in transformers "
        "itself: `limit` is 4 times what transformers differs from itself by, in float64 and with its own cache, if "
        "that is more than the bound, and never more than 16 times the bound. Faults planted in tests show at 100 "
        "times the bound at least, so none of them would pass here.",
        "",
        "| architecture | model | transformers | result | error | bound | limit | nodes | states | seconds | reason |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, group in groupby(rows, key=lambda row: (row.architecture, row.result, row.reason)):
        seen = list(group)
        row = seen[-1]
        error = f"{max(row.error.values()):.1e}" if row.error else ""
        bound, limit = (f"{number:.1e}" if number else "" for number in (row.bound, row.limit))
        reason, on = row.reason.replace("|", "\\|"), ", ".join(r.transformers for r in seen)
        lines.append(
            f"| {row.architecture} | {row.model} | {on} | {row.result} | {error} | {bound} | "
            f"{limit} | {row.nodes or ''} | {row.states or ''} | {row.seconds:.0f} | {reason} |"
        )
    return "\n".join(lines) + "\n"
