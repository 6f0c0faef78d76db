"""The progress bar of long batches of texts."""

from __future__ import annotations

import io
import sys

import pytest

from qeff_ir.runtime.sentences import _Progress


class Terminal(io.StringIO):
    """A terminal that keeps what it is shown."""

    def isatty(self) -> bool:
        return True


def shown(show: bool | None, stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    """What three texts, done at once, put on the screen."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with _Progress(3, show) as progress:
        progress.advance(1)
        progress.advance(2)
    return stderr.getvalue()


def test_a_bar_that_is_asked_for_appears_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in (io.StringIO(), Terminal()):
        text = shown(True, stderr, monkeypatch)
        assert "Embedding" in text
        assert "100%" in text


@pytest.mark.parametrize(("show", "stderr"), [(False, Terminal()), (None, io.StringIO()), (None, Terminal())])
def test_no_bar_where_none_is_wanted_nor_for_a_moment(
    show: bool | None, stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(show, stderr, monkeypatch) == ""


def test_a_terminal_shows_a_bar_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with _Progress(3, None) as progress:
        progress._due -= 2.0  # two seconds later
        progress.advance(3)
    assert "100%" in terminal.getvalue()
