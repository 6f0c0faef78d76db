"""The record of a nightly run: which property has had how many examples, from which seeds, at which commit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Slice:
    """What one process ran.

    Attributes:
        seed: Given to hypothesis.
        examples: Random examples that were run to their end.
        rejected: Draws that were no example (an assumption did not hold, or too much was drawn).
        tests: Tests that ran: one, or one for each case of a parametrized property.
        seconds: Of processor time.
        commit: Of the source; ends in ``+`` when there were changes besides.
        failures: First line of each failure.
        exhausted: Whether there are no more examples than these.
    """

    seed: int
    examples: int
    rejected: int
    tests: int
    seconds: float
    commit: str
    failures: tuple[str, ...] = ()
    exhausted: bool = False


@dataclass
class Property:
    """What is known of one property.

    Attributes:
        drawn: Whether hypothesis draws its examples; else it goes through all there are, and one run is enough.
        cases: Parameters that it has; examples are spread over them.
        slices: What was run, in order.
    """

    drawn: bool
    cases: int
    slices: list[Slice] = field(default_factory=list[Slice])

    @property
    def examples(self) -> int:
        """Examples of all slices without a failure."""
        return sum(s.examples for s in self.slices if not s.failures)

    @property
    def seconds(self) -> float:
        """Of processor time, in all."""
        return sum(s.seconds for s in self.slices)

    @property
    def failing(self) -> bool:
        """Whether the last slice failed."""
        return bool(self.slices and self.slices[-1].failures)

    def left(self, target: int) -> int:
        """Examples (or, where none are drawn, runs) that are still to do."""
        fine = [s for s in self.slices if not s.failures]
        if not self.drawn:
            return int(not fine)
        return 0 if any(s.exhausted for s in fine) else max(0, target - self.examples)


@dataclass
class Record:
    """All of it.

    Attributes:
        target: Examples that each property is to have.
        versions: Of the libraries.
        properties: By ``file::name``.
    """

    target: int
    versions: dict[str, str]
    properties: dict[str, Property] = field(default_factory=dict[str, Property])

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        found = {
            name: Property(
                p["drawn"], p["cases"], [Slice(**s | {"failures": tuple(s["failures"])}) for s in p["slices"]]
            )
            for name, p in data["properties"].items()
        }
        return cls(data["target"], data["versions"], found)

    def save(self, path: Path) -> None:
        """Write the record, and the table beside it; a reader sees the old ones or the new ones."""
        data = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        for file, text in ((path, data), (path.with_suffix(".md"), self.table())):
            draft = file.with_name(f".{file.name}")
            draft.write_text(text)
            draft.replace(file)

    def table(self) -> str:
        """As Markdown."""
        lines = [
            "# Nightly run of the properties",
            "",
            f"Written by `python -m tests.nightly`; the target is {self.target:,} random examples a property. Only",
            "what ran to its end is counted. A parametrized property spreads its examples over its cases; one that",
            "goes through all there are draws nothing and runs once.",
            "",
            "| property | examples | cases | CPU s | result | commits | seeds |",
            "| --- | ---: | ---: | ---: | --- | --- | --- |",
        ]
        for name, item in sorted(self.properties.items()):
            fine = [s for s in item.slices if not s.failures]
            found = len(item.slices) - len(fine)
            result = "clean" if not item.left(self.target) else "unfinished" if fine else "not run"
            if found:
                result = "failing" if item.failing else f"{result}, after {found} failing"
            commits = " ".join(dict.fromkeys(s.commit for s in item.slices))
            seeds = " ".join(f"{s.seed}{'!' if s.failures else ''}" for s in item.slices) if item.drawn else ""
            every = not item.drawn or any(s.exhausted for s in fine)
            examples = ("all" if every else "") + (f" {fine[-1].examples}" if every and item.drawn and fine else "")
            examples = examples or f"{item.examples:,}"
            cells = name, examples, item.cases, f"{item.seconds:.0f}", result, commits, seeds
            lines.append(f"| {' | '.join(map(str, cells))} |")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*lines, "", f"A seed with `!` is of a slice that failed. Versions: {versions}.", ""])
