"""Run slices of every family, the one with the fewest inputs first; write the record after each."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


def main() -> int:
    """See the package."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many in all, spread over the families")
    parser.add_argument("--slice", type=int, default=500, help="inputs of one process")
    parser.add_argument("--minutes", type=float, help="start no slice after so long")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="families")
    parser.add_argument("--seed", type=int, help="of the first slice; each slice has one of its own")
    parser.add_argument("--replay", metavar="FAMILY:SEED", help="run one slice here, and shrink its first fault")
    parser.add_argument("--record", type=Path, help="where the record lies; in the suite's folder by default")
    parser.add_argument("--anew", action="store_true", help="forget what the record knows")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        os.environ["QEFF_FUZZ"] = name
        os.environ.setdefault("QEFF_HOME", f"{name}/home")
        from tests.fuzz import slices
        from tests.fuzz.base import base
        from tests.fuzz.families import FAMILIES
        from tests.fuzz.record import RECORD, Record

        base()
        if given.replay:
            family, _, start = given.replay.rpartition(":")
            slices.replay(family, int(start), given.slice)
            return 0
        unknown = set(given.only or ()) - set(FAMILIES)
        if unknown:
            parser.error(f"no family is called '{min(unknown)}': there are {', '.join(FAMILIES)}")
        names = given.only or list(FAMILIES)
        place: Path = given.record or RECORD
        record = Record() if given.anew or not place.is_file() else Record.load(place)
        share, until = -(-given.inputs // len(names)), time.monotonic() + 60 * (given.minutes or 1e6)
        draw = random.Random(given.seed)
        faulty: Counter[str] = Counter()
        while time.monotonic() < until:
            left = {n: share - record.inputs(n) - faulty[n] for n in names}
            todo = [n for n in names if left[n] > 0]
            if not todo:
                break
            family = max(todo, key=left.__getitem__)
            start = next(n for n in iter(lambda: draw.randrange(1 << 32), None) if n not in record.seeds(family))
            inputs = min(given.slice, left[family])
            outcome = slices.run(family, start, inputs)
            record.add(family, start, outcome)
            record.save(place)
            if outcome.faults:  # not clean, but this run does not stay at the family for it
                faulty[family] += inputs
            print(
                f"{family:12} seed {start:10}  {outcome.accepted:5} accepted {outcome.refused:5} refused "
                f"{outcome.seconds:6.1f} s",
                *(f"\n    {n} x {text}" for text, n in outcome.faults.items()),
                flush=True,
            )
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
