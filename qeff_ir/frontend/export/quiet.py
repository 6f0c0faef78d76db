"""The exporter's notes to itself, which are about its own internals, or repeat an exception that follows."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import warnings
from collections.abc import Generator
from typing import cast

_NOISY = ("torch.onnx", "torch.export", "torch._subclasses", "onnxscript", "onnx_ir")
"""Loggers, with all below them."""

_threads: set[int] = set()
"""Those that are to hear nothing."""


class _HereOnly(type):
    def __subclasscheck__(cls, other: type) -> bool:
        return threading.get_ident() in _threads


class _FromHere(Warning, metaclass=_HereOnly):
    """Any warning of a thread that is to hear nothing, and none of another: filters belong to the whole process."""


def _wanted(record: logging.LogRecord) -> bool:
    return record.thread not in _threads or record.levelno >= logging.CRITICAL


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep warnings and the exporter's log records of this thread back; levels and filters of others stay."""
    importlib.import_module("torch.onnx._internal.exporter._registration")  # or its logger would come too late
    loggers = [logging.getLogger(name) for name in _NOISY]
    below = [name for name in logging.root.manager.loggerDict if name.startswith(tuple(f"{n}." for n in _NOISY))]
    loggers += [logging.getLogger(name) for name in below]
    thread = threading.get_ident()
    inner = thread in _threads
    _threads.add(thread)
    for log in loggers:
        log.addFilter(_wanted)
    warnings.simplefilter("ignore", _FromHere)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # another thread has put its own list of filters back
            cast("list[object]", warnings.filters).remove(("ignore", None, _FromHere, None, 0))
        for log in loggers:
            log.removeFilter(_wanted)
        if not inner:
            _threads.discard(thread)
