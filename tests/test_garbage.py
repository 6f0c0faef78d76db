"""Modules that nobody holds are freed, also in a process that makes one after another."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from qeff_ir import garbage
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.testing.build import build
from qeff_ir.testing.recipe import Recipe


@pytest.fixture(autouse=True)
def _own_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(garbage, "_left", 0)
    yield
    gc.collect()


def alive(rounds: int) -> int:
    """How many of so many modules, each dropped after a pipeline, are there still."""
    graphs = []
    for _ in range(rounds):
        module = build(Recipe()).module
        run_pipeline(module, Pipeline.parse("canonicalize,fuse-norms"))
        graphs.append(weakref.ref(module.graph))
        del module
    return sum(graph() is not None for graph in graphs)


def test_modules_are_freed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "MANY", 20_000)
    assert alive(30) < 15


def test_without_the_count_none_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill test: this is how it was, and a run over thousands of modules took gigabytes."""
    monkeypatch.setattr(garbage, "MANY", 10**9)
    assert alive(30) >= 25


def test_the_collector_is_on_or_off_as_before() -> None:
    for enabled in (True, False):
        gc.enable() if enabled else gc.disable()
        with garbage.settled():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == 0
    gc.enable()


def test_other_threads_make_tuples_meanwhile() -> None:
    """A list of all objects holds tuples that another thread still fills, which Python then cannot give their size."""
    failed: list[BaseException] = []
    done = threading.Event()

    def fill() -> None:
        try:
            while not done.is_set():
                assert len(tuple(n for n in range(2_001))) == 2_001
        except BaseException as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=fill)
    try:
        thread.start()
        for _ in range(300):
            with garbage.settled():
                pass
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert failed == []
