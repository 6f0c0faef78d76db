"""One try: a build that is killed or fails, what it has left, and the build after it."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qeff_ir import replacement
from qeff_ir.errors import QeffError
from tests.kills.harm import CODES, Events, Harm
from tests.kills.variants import NEW, OLD, VARIANTS, Bench, Variant

DONE, REFUSED, RAW = 0, 2, 70


@dataclass(frozen=True)
class Try:
    """What is tried.

    Attributes:
        variant: What is built.
        replacing: Whether the old edition is there before.
        exchange: Whether the file system can exchange two folders.
        harm: What happens; an event beyond the last one is a kill at a random time.
        asks: Whether what is left is run, too.
    """

    variant: Variant
    replacing: bool
    exchange: bool
    harm: Harm
    asks: bool

    def __str__(self) -> str:
        what = f"{self.variant.name}, {'replacing' if self.replacing else 'new'}"
        return f"{what}{'' if self.exchange else ', no exchange'}, {self.harm.kind} {self.harm.code} at {self.harm.at}"


class Engine:
    """Runs tries, each on a folder of its own.

    Args:
        root: An empty folder.
        seed: Of what is drawn.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._root = root
        os.environ["QEFF_HOME"] = str(root / "home")
        self._bench = Bench(root)
        self._bench.remember_tokens(_asked)
        self._events: dict[tuple[str, bool, bool], tuple[int, float]] = {}
        self.counts: Counter[str] = Counter()

    def draw(self) -> Try:
        """The next try."""
        random = self._random
        variant, replacing = random.choice(VARIANTS), random.random() < 0.6
        exchange = not replacing or variant.file != "out" or random.random() < 0.5
        count, _ = self._clean(variant, replacing, exchange)
        kind = random.choices(("kill", "none", "error", "errors"), (6, 1, 2, 1))[0]
        harm = Harm(kind, random.randint(1, count), random.choice(CODES) if kind.startswith("error") else 0)
        return Try(variant, replacing, exchange, harm, random.random() < 0.1)

    def run(self, this: Try) -> list[str]:
        """Try; returns what is wrong.

        A harm of the kind ``none`` is a kill at a random time, in the middle of whatever happens then.
        """
        with tempfile.TemporaryDirectory(dir=self._root) as name:
            place = Path(name)
            out = place / this.variant.file
            if this.replacing:
                self._put_old(this.variant, place)
            after = None
            if this.harm.kind == "none":
                _, seconds = self._clean(this.variant, this.replacing, this.exchange)
                after = self._random.uniform(0, seconds)
            code, said, _ = _forked(lambda: self._build(this, out), after)
            killed = code == -signal.SIGKILL
            self.counts["killed" if killed else f"{this.harm.kind}: ended with {code}"] += 1
            wrong = [f"raw error: {said}"] if code == RAW else []
            wrong += self._judge(this, out, code)
            if any(text.startswith("lost") or "neither" in text for text in wrong):
                return wrong
            code, said, _ = _forked(lambda: self._bench.build(this.variant, NEW, out), None)
            if code != DONE:
                return [*wrong, f"the next run ended with {code}: {said}"]
            wrong += [f"the next run: {text}" for text in self._judge(this, out, DONE)]
            names = sorted(path.name for path in place.iterdir() if path != out)
            if this.variant.file != "out":
                names = [n for n in names[1:] if n] if names and names[0].startswith("out.weights-") else names
            return [*wrong, f"the next run left {names}"] if names else wrong

    def _judge(self, this: Try, out: Path, code: int) -> list[str]:
        """What is wrong with what is there after a build that ended so."""
        try:
            found = self._bench.edition(this.variant, out)
        except Exception as error:
            return [f"of neither edition, or damaged: {error!r}"]
        self.counts[f"found {found}"] += 1
        if found is None:
            return ["lost: the old one is gone"] if this.replacing else ["lost"] if code == DONE else []
        if code == DONE and found != NEW:
            return ["the old one is still there after a build that ended well"]
        if this.asks and self._bench.answers(this.variant):
            self.counts["asked"] += 1
            got, expected = _pickled(lambda: self._bench.tokens(this.variant, found, out))
            return [] if got == expected else ["wrong tokens"]
        return []

    def _build(self, this: Try, out: Path) -> int:
        """In a process of its own: do harm to a build; returns how many events there were."""
        if not this.exchange:
            replacement.exchange = lambda *_: False
        temporary = out.parent.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        events = Events(out.parent, this.harm)
        events.install()
        self._bench.build(this.variant, NEW, out)
        return events.count

    def _clean(self, variant: Variant, replacing: bool, exchange: bool) -> tuple[int, float]:
        """Events and seconds of a build that nobody harms."""
        key = variant.name, replacing, exchange
        if key not in self._events:
            with tempfile.TemporaryDirectory(dir=self._root) as name:
                if replacing:
                    self._put_old(variant, Path(name))
                this = Try(variant, replacing, exchange, Harm("none"), False)
                started = time.monotonic()
                code, said, count = _forked(lambda: self._build(this, Path(name) / variant.file), None)
                assert code == DONE and isinstance(count, int), said
                self._events[key] = count, time.monotonic() - started
        return self._events[key]

    def _put_old(self, variant: Variant, place: Path) -> None:
        shutil.copytree(self._root / "pristine" / variant.name / OLD, place, dirs_exist_ok=True)


def _forked(work: Callable[[], object], kill_after: float | None) -> tuple[int, str, object]:
    """Run something in a process of its own: how it ended (minus the signal), what it said, what it returned."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code, result = DONE, None
            try:
                result = work()
            except QeffError as error:
                code, result = REFUSED, str(error)
            except BaseException:
                code, result = RAW, traceback.format_exc()
            os.pwritev(said.fileno(), [pickle.dumps(result)], 0)  # none of the operations that do harm
            os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # still a child of ours, ended or not, until it is waited for
        _, status = os.waitpid(child, 0)
        said.seek(0)
        data = said.read()
        result = pickle.loads(data) if data else None
        return os.waitstatus_to_exitcode(status), str(result), result


def _pickled(work: Callable[[], object]) -> tuple[object, object]:
    code, said, result = _forked(work, None)
    assert code == DONE and isinstance(result, tuple), said
    return result


def _asked(work: Callable[[], object]) -> object:
    code, said, result = _forked(work, None)
    assert code == DONE, said
    return result
