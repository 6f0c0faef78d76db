"""What reaches the terminal: answers on stdout, progress and errors on stderr, and nothing that a library says."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

_OURS = [Path(__file__).parents[2] / name for name in ("qeff_ir", "passes", "backends")]
"""Our packages; warnings from elsewhere are not for the user."""
_SOON = 0.01
"""Seconds in which a finalizer has ended, mostly."""


def show(what: RenderableType = "") -> None:
    """Print a table or a paragraph, wrapped to the terminal's width (80 columns where there is none)."""
    Console(highlight=False, markup=False).print(what)


def line(*parts: str | tuple[str, str]) -> None:
    """Print one line that is never wrapped, so that paths and commands can be copied.

    Args:
        parts: Texts, each with a style when it is a pair.
    """
    Console(highlight=False, markup=False).print(Text.assemble(*parts), soft_wrap=True)


def complain(message: str, kind: str = "error") -> None:
    """Print an error or a warning on stderr."""
    style = "bold red" if kind == "error" else "yellow"
    text = Text.assemble((f"qeff: {kind}:", style), " ", message)
    Console(stderr=True, highlight=False, markup=False).print(text, soft_wrap=True)


@contextlib.contextmanager
def working(text: str) -> Generator[Callable[[str], None]]:
    """A live line with a spinner and the time, on a terminal only; call the result to say what goes on now."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _text: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from qeff_ir.digests import telling

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=None)
        with telling(lambda text: progress.update(task, description=text)):
            yield lambda text: progress.reset(task, description=text)


@contextlib.contextmanager
def interrupts() -> Generator[Callable[[], bool]]:
    """Within it, the result tells whether there was an interrupt (SIGINT); each raises `KeyboardInterrupt` as ever.

    Python ignores one that comes inside a finalizer, and prints so; it is sent once more instead.
    Always false where the process handles interrupts in its own way, or outside its main thread.
    """
    seen = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        seen.set()
        signal.default_int_handler(number, frame)

    def again(ignored: sys.UnraisableHookArgs) -> None:
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            threading.Timer(_SOON, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            told(ignored)

    before, told = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return
    signal.signal(signal.SIGINT, note)
    sys.unraisablehook = again
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = told


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep the libraries from writing between our lines; our own warnings become one line each."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_warning
            yield
    finally:
        logging.disable(before)


def quiet_transformers() -> None:
    """Turn transformers' progress bars and remarks off; called once it is imported anyway."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()


def write_any_text() -> None:
    """Let a terminal that has no arrows print question marks instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def seconds(value: float) -> str:
    """A duration for people: ``12 ms`` or ``3.4 s``."""
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_rest: Any) -> None:
    if issubclass(category, UserWarning) and any(Path(filename).is_relative_to(folder) for folder in _OURS):
        complain(str(message), "warning")
