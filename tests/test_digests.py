"""Digests are taken once on a machine, and never believed of a file that may have changed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from qeff_ir import digests
from qeff_ir.errors import PackageError

SIZE = (1 << 20) + 5


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and nothing known."""
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_taken", {})
    return tmp_path / "home"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read."""
    found: list[Path] = []
    real = digests._read

    def read(path: Path, *rest: Any) -> str:
        found.append(path)
        return real(path, *rest)

    monkeypatch.setattr(digests, "_read", read)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * SIZE)
    digests.settle()
    return path


def forget() -> None:
    """As another process."""
    digests._taken.clear()


def right(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("home")
def test_a_digest_is_taken_once_on_a_machine(file: Path, reads: list[Path]) -> None:
    assert digests.digest_file(file) == right(file)
    forget()
    assert digests.digest_file(file) == right(file)
    assert reads == [file]


@pytest.mark.usefixtures("home")
def test_a_part_and_a_conversion_have_digests_of_their_own(file: Path, reads: list[Path]) -> None:
    found = {digests.digest_file(file), digests.digest_file(file, 1), digests.digest_file(file, 0, 7)}
    found.add(digests.digest_file(file, convert=("upper", bytes.upper)))
    assert found == {
        hashlib.sha256(data).hexdigest() for data in (b"a" * SIZE, b"a" * (SIZE - 1), b"a" * 7, b"A" * SIZE)
    }
    forget()
    digests.digest_file(file, 0, 7)
    digests.digest_file(file, 0, SIZE)  # a part that is the whole
    assert len(reads) == 4
    with pytest.raises(PackageError, match="ends before its data do"):
        digests.digest_file(file, 5, SIZE)


@pytest.mark.usefixtures("home")
def test_a_change_with_the_old_time_is_seen(file: Path) -> None:
    before = file.stat()
    old = digests.digest_file(file)
    with file.open("r+b") as opened:
        opened.write(b"b")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.digest_file(file) == right(file) != old


@pytest.mark.usefixtures("home")
def test_what_was_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    """Two writes within one tick of the clock have one ctime."""
    path = tmp_path / "new"
    for data in (b"a" * SIZE, b"b" * SIZE):
        path.write_bytes(data)
        assert digests.digest_file(path) == hashlib.sha256(data).hexdigest()


@pytest.mark.usefixtures("home")
def test_a_copy_and_a_hard_link_are_not_read_again(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    digests.digest_file(file)
    before = digests.stamp(file)
    os.link(file, tmp_path / "link")
    (tmp_path / "copy").write_bytes(file.read_bytes())
    for name in ("link", "copy"):
        digests.same_digest(tmp_path / name, file, before)
        assert digests.digest_file(tmp_path / name) == right(file)
    assert digests.digest_file(file) == right(file)
    assert reads == [file]


@pytest.mark.usefixtures("home")
def test_a_copy_of_what_has_changed_is_read(file: Path, tmp_path: Path) -> None:
    digests.digest_file(file)
    before = digests.stamp(file)
    file.write_bytes(b"b" * SIZE)
    (tmp_path / "copy").write_bytes(file.read_bytes())
    digests.same_digest(tmp_path / "copy", file, before)
    assert digests.digest_file(tmp_path / "copy") == right(file)


@pytest.mark.parametrize("text", ["", "[", "[]", "5", '{"a": 5}', "[" * 100_000, "\xff", None])
def test_a_damaged_memory_is_as_good_as_none(text: str | None, home: Path, file: Path) -> None:
    home.mkdir()
    (home / digests.FILE).mkdir() if text is None else (home / digests.FILE).write_text(text, encoding="latin-1")
    assert digests.digest_file(file) == right(file)
    forget()
    assert digests.digest_file(file) == right(file)
    if text is not None:
        assert right(file) in json.loads((home / digests.FILE).read_text()).values()


def test_a_home_that_takes_no_files_is_as_good_as_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", "/proc/nowhere")
    monkeypatch.setattr(digests, "_taken", {})
    assert digests.digest_file(file) == right(file)


def _take(folder: Path, number: int) -> None:
    for index in range(5):
        path = folder / f"{number}-{index}"
        path.write_bytes(bytes([number, index]) * SIZE)
        digests.settle()
        assert digests.digest_file(path) == right(path)


def test_several_processes_may_remember_at_a_time(home: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_take, args=(tmp_path, number)) for number in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * 4
    assert json.loads((home / digests.FILE).read_text())
    assert [path.name for path in home.iterdir()] == [digests.FILE]


def test_the_memory_is_bounded(home: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_MOST", 3)
    for offset in range(6):
        digests.digest_file(file, offset)
    assert len(json.loads((home / digests.FILE).read_text())) == len(digests._taken) == 3


@pytest.mark.usefixtures("home")
def test_slow_reading_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SLOW", 0.0)
    monkeypatch.setattr(digests, "_CHUNK", SIZE // 4)
    said: list[str] = []
    with digests.telling(said.append):
        digests.digest_file(file)
    assert said[0] == "Reading weights for the first time here, 24 %" and said[-1].endswith("100 %")
