"""One slice: some inputs of one family, in a process of its own that may hang, die or grow without harm."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from qeff_ir.errors import QeffError, is_panic
from tests.fuzz.families import FAMILIES

ROOT = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")
_CPU_SECONDS, _SECONDS, _SILENCE = 20.0, 60.0, 180.0
"""An input ends after so much processor time, or so long; a process that shows nothing for `_SILENCE` is ended."""
_BYTES = 4 << 30
"""What an input may add to the memory of the process."""


@dataclass
class Outcome:
    """What a slice reports.

    Attributes:
        accepted: Inputs that were read.
        refused: Inputs that ended in one sentence.
        faults: Everything else, by its text: how often.
        seconds: Of processor time.
    """

    accepted: int = 0
    refused: int = 0
    faults: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.accepted + self.refused + sum(self.faults.values())


class _EndlessError(BaseException):
    """An input took too long."""


class FaultError(AssertionError):
    """What `replay` shows of a fault."""


def run(family: str, start: int, inputs: int) -> Outcome:
    """Run a slice in a fork, which has all that was imported and made so far.

    Args:
        family: Its name.
        start: The seed that hypothesis draws from.
        inputs: How many.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name, mmap.mmap(-1, 8) as seen:
        result = Path(name) / "outcome.json"
        gc.collect()  # sessions that nobody holds: in the fork, which lacks their threads, to end them would never end
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _child(family, start, inputs, Path(name), seen)
                code = 0
            except BaseException:
                (Path(name) / "died.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        status, usage = _wait(child, seen)
        outcome = Outcome(**json.loads(result.read_text())) if result.is_file() else Outcome()
        if status:
            died = Path(name) / "died.txt"
            what = died.read_text().strip().splitlines()[-1] if died.is_file() else _how(status)
            count = int.from_bytes(seen[:8], "little")
            outcome.faults[f"the process ended at input {count}: {what}"] = 1
    outcome.seconds = usage.ru_utime + usage.ru_stime if usage is not None else time.monotonic() - began
    return outcome


def _wait(child: int, seen: mmap.mmap) -> tuple[int, resource.struct_rusage | None]:
    last, since = bytes(seen[:8]), time.monotonic()
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if bytes(seen[:8]) != last:
            last, since = bytes(seen[:8]), time.monotonic()
        if time.monotonic() - since > _SILENCE:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(0.02)


def _how(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"


def _child(family: str, start: int, inputs: int, folder: Path, seen: mmap.mmap) -> None:
    outcome, result = Outcome(), folder / "outcome.json"
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    faults: Counter[str] = Counter()
    with _fenced(folder / "inputs") as escapes:

        def one(data: st.DataObject) -> None:
            try:
                attempt(family, data, folder / "inputs", escapes)
                outcome.accepted += 1
            except QeffError:
                outcome.refused += 1
            except FaultError as fault:
                faults[str(fault)] += 1
                outcome.faults = dict(faults)
            count = outcome.inputs
            seen[:8] = count.to_bytes(8, "little")
            if count % 50 == 0 or faults:
                result.write_text(json.dumps(asdict(outcome)))

        _engine(one, start, inputs, [Phase.generate])()
    result.write_text(json.dumps(asdict(outcome)))


def replay(family: str, start: int, inputs: int) -> None:
    """Run a slice in this process until its first fault, which hypothesis shrinks and prints.

    Raises:
        FaultError: The fault.
    """
    with tempfile.TemporaryDirectory() as name, _fenced(Path(name)) as escapes:

        def one(data: st.DataObject) -> None:
            with contextlib.suppress(QeffError):
                attempt(family, data, Path(name), escapes)

        _engine(one, start, inputs, [Phase.generate, Phase.shrink])()


def _engine(one: Any, start: int, inputs: int, phases: list[Phase]) -> Any:
    chosen = settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=phases,
        verbosity=Verbosity.quiet if Phase.shrink not in phases else Verbosity.normal,
        suppress_health_check=list[Any](HealthCheck),
        derandomize=False,
    )
    return seed(start)(chosen(given(st.data())(one)))


def attempt(family: str, data: st.DataObject, folder: Path, escapes: list[str]) -> None:
    """One input.

    Raises:
        QeffError: It is refused.
        FaultError: Something that may not happen.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    escapes.clear()
    refusal: QeffError | None = None
    try:
        with _limited():
            FAMILIES[family](data.draw, folder)
    except QeffError as error:
        refusal = error
    except _EndlessError as error:
        raise FaultError(f"it does not end, {_place(error)}") from error
    except BaseException as error:
        ours = isinstance(error, Exception) or is_panic(error)
        if not ours or type(error).__module__.startswith("hypothesis"):
            raise
        said = re.sub(r"\s+|0x[0-9a-f]+", " ", str(error)).strip()[:160]
        raise FaultError(f"{type(error).__name__} {_place(error)}: {said}") from error
    if escapes:
        raise FaultError(escapes[0])
    if refusal is not None:
        if not str(refusal).strip():
            raise FaultError(f"{type(refusal).__name__} without a sentence, {_place(refusal)}")
        raise refusal


def _place(error: BaseException) -> str:
    """Where the innermost line of the project stands."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename and f.name != "_stop"]
    ours = [f for f in frames if "/tests/" not in f.filename] or frames
    return f"in {Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name}" if ours else "outside of the project"


@contextlib.contextmanager
def _limited() -> Generator[None]:
    """Bound the time and the memory of one input."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, limits[1]))
    handlers = {s: signal.signal(s, _stop) for s in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise _EndlessError


_WRITES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}
"""Audit events that change files: which of their arguments are paths, and which the open folders these start from."""
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn")


@contextlib.contextmanager
def _fenced(folder: Path) -> Generator[list[str]]:
    """Note what leaves the folder: files written or changed elsewhere, programs, code of the input that runs."""
    escapes: list[str] = []
    active = True
    home = folder.parent / "home"
    fence = (os.path.realpath(folder), os.path.realpath(home), "/dev/null", os.path.realpath(".hypothesis"))

    def outside(path: object, start: object = None) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        below = f"/proc/self/fd/{start}" if isinstance(start, int) and start >= 0 else ""
        real = os.path.realpath(os.path.join(below, os.fsdecode(path)))
        return not any(real == place or real.startswith(f"{place}/") for place in fence)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not active:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            if outside(arguments[0]):
                escapes.append(f"{arguments[0]!r} is opened for writing")
        elif event in _WRITES:
            for at, start in _WRITES[event]:
                if outside(arguments[at], None if start is None else arguments[start]):
                    escapes.append(f"{event} of {arguments[at]!r}")
        elif event in _RUNS:
            escapes.append(f"{event} {arguments[:1]!r}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(f"{fence[0]}/"):
            escapes.append(f"code of the input runs: {arguments[0].co_filename}")

    sys.addaudithook(hook)
    before = {name: os.environ.get(name) for name in ("QEFF_HOME", "TMPDIR", "QEFF_BUNDLES")}
    home.mkdir(parents=True, exist_ok=True)
    os.environ.update(QEFF_HOME=str(home), TMPDIR=str(home), QEFF_BUNDLES=str(home / "bundles"))
    tempfile.tempdir = None
    try:
        yield escapes
    finally:
        active = False
        tempfile.tempdir = None
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
