"""Modules that nobody holds are freed, also in a process that makes one after another."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from qeff_ir import garbage
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.testing.build import build
from qeff_ir.testing.recipe import Recipe


@pytest.fixture(autouse=True)
def _own_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(garbage, "_left", 0)
    monkeypatch.setattr(garbage, "_living", 0)
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
    monkeypatch.setattr(garbage, "PART", 10**9)  # however much this process holds
    assert alive(30) < 15


def test_the_more_lives_the_more_may_be_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through all that lives takes the longer the more that is: it is done the more seldom."""
    monkeypatch.setattr(garbage, "MANY", 20_000)
    monkeypatch.setattr(garbage, "PART", 1)
    monkeypatch.setattr(garbage, "_living", 10**9)
    assert alive(30) >= 25


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
    filling, go, done = threading.Event(), threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        yield from range(5)
        filling.set()
        assert go.wait(60)
        yield from range(2_000)

    def fill() -> None:
        try:
            assert len(tuple(numbers())) == 2_005
        except BaseException as error:
            failed.append(error)
        done.set()

    def let_the_other_thread_run(frame: FrameType, event: str, function: Any) -> None:
        """While the objects that a function of the collector has returned are still held."""
        if event == "c_return" and function in (gc.get_objects, gc.get_referrers, gc.get_referents):
            go.set()
            assert done.wait(60)

    thread = threading.Thread(target=fill)
    thread.start()
    assert filling.wait(60)
    sys.setprofile(let_the_other_thread_run)
    try:
        with garbage.settled():
            pass
    finally:
        sys.setprofile(None)
        go.set()
        thread.join()
    assert failed == []


def test_a_list_of_all_objects_would_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill test: this is how objects were counted."""

    def count() -> tuple[int, int, int]:
        return len(gc.get_objects()), 0, 0

    monkeypatch.setattr(gc, "get_count", count)
    with pytest.raises(AssertionError, match="SystemError"):
        test_other_threads_make_tuples_meanwhile()
