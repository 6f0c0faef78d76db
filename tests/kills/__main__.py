"""Try so many times, print what is wrong, and write down what was done."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

from tests.kills.engine import Engine
from tests.nightly.__main__ import commit

RECORD = Path(__file__).with_name("record.md")
_HEAD = """# Builds that were killed, or met a failing disk

Each line is one call of `python -m tests.kills`. Killed: by SIGKILL, at a drawn event of the file system or at a drawn
time. Failed: an operation, or all from one on, answered ENOSPC, EIO or EACCES. Lost: neither the old nor the new result
is there. Wrong: what is there is damaged or answers with other tokens, an error is no sentence, or the next run fails
or leaves something.

| commit | seed | tries | killed | failed | lost | wrong | minutes |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def main() -> None:
    """Try until so many builds were really killed, or until Ctrl-C or SIGTERM; what was done counts."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="builds that are really killed; others come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"add a line to {RECORD.name}")
    given = parser.parse_args()
    started, tries, lost, wrong = time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="kills-") as name, contextlib.ExitStack() as stack:
        engine = Engine(Path(name), given.seed)
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        for _ in track(range(given.runs), "Killing"):
            before = engine.counts["killed"]
            while engine.counts["killed"] == before:
                this = engine.draw()
                tries += 1
                found = engine.run(this)
                lost += any(text.startswith("lost") for text in found)
                wrong += any(not text.startswith("lost") for text in found)
                for text in found:
                    print(f"{this}: {text}", flush=True)
    failed = sum(n for what, n in engine.counts.items() if what.startswith("error"))
    print(dict(sorted(engine.counts.items())))
    line = (commit(), given.seed, tries, engine.counts["killed"], failed, lost, wrong)
    minutes = (time.monotonic() - started) / 60
    text = "| " + " | ".join(map(str, line)) + f" | {minutes:.0f} |\n"
    print(text, end="")
    if given.record:
        RECORD.write_text((RECORD.read_text() if RECORD.is_file() else _HEAD) + text)
    sys.exit(1 if lost or wrong else 0)


if __name__ == "__main__":
    main()
