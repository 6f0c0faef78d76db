"""The record of the fuzz suite: which family has had how many inputs, from which seeds, at which commit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.slices import Outcome
from tests.nightly.__main__ import commit

RECORD = Path(__file__).with_name("record.json")


@dataclass
class Record:
    """Slices by family, in the order in which they ran."""

    slices: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote."""
        return cls(json.loads(path.read_text()))

    def add(self, family: str, seed: int, outcome: Outcome) -> None:
        """Note a slice."""
        self.slices.setdefault(family, []).append({"seed": seed, "commit": commit(RECORD), **asdict(outcome)})

    def inputs(self, family: str) -> int:
        """Inputs of the slices without a fault."""
        return sum(s["accepted"] + s["refused"] for s in self.slices.get(family, []) if not s["faults"])

    def seeds(self, family: str) -> set[int]:
        """Of all its slices; a run that goes on takes others."""
        return {s["seed"] for s in self.slices.get(family, [])}

    def seconds(self, family: str) -> float:
        """Of processor time."""
        return sum(s["seconds"] for s in self.slices.get(family, []))

    def save(self, path: Path) -> None:
        """Write the record, and the table beside it; a reader sees the old ones or the new ones."""
        rows = "".join(f' "{name}": [\n' + ",\n".join(f"  {json.dumps(s)}" for s in found) + "\n ],\n"
                       for name, found in self.slices.items())  # fmt: skip
        for file, text in ((path, "{\n" + rows.rstrip(",\n") + "\n}\n"), (path.with_suffix(".md"), self.table())):
            draft = file.with_name(f".{file.name}")
            draft.write_text(text)
            draft.replace(file)

    def table(self) -> str:
        """As Markdown."""
        lines = [
            "# Run of the fuzz suite",
            "",
            "Written by `python -m tests.fuzz`. Only slices without a fault count as clean; the others stand in",
            "`record.json`, each with its seed and its faults.",
            "",
            "| family | clean inputs | accepted | refused | slices with a fault | CPU s | commits |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for name, found in sorted(self.slices.items()):
            fine = [s for s in found if not s["faults"]]
            cells = (
                name,
                f"{self.inputs(name):,}",
                f"{sum(s['accepted'] for s in fine):,}",
                f"{sum(s['refused'] for s in fine):,}",
                len(found) - len(fine),
                f"{self.seconds(name):.0f}",
                " ".join(dict.fromkeys(s["commit"] for s in found)),
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        total = sum(self.inputs(name) for name in self.slices)
        return "\n".join([*lines, "", f"{total:,} clean inputs in all.", ""])
