"""A folder that is built gets its place in one step, whatever its name is, and whatever kills the builder."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qeff_ir import replacement
from qeff_ir.errors import PackageError
from qeff_ir.package import MAIN, Manifest, ProgramRecord, building, open_package, seal


def fill(folder: Path, text: str) -> None:
    (folder / "a.bin").write_text(text)
    seal(folder, Manifest("onnxruntime", "key", True, {}, {MAIN: ProgramRecord("Model", {})}))


def build(out: Path, text: str = "old") -> None:
    with building(out) as partial:
        fill(partial, text)


def build_file(out: Path) -> None:
    with replacement.building_file(out, lambda _: True) as (partial, data):
        (partial / data).mkdir()
        (partial / data / "w.bin").write_text("weights")
        (partial / out.name).write_text(data)


def content(out: Path) -> str:
    open_package(out)
    return (out / "a.bin").read_text()


def beside(out: Path) -> list[str]:
    """Names beside a folder, but those without a dot in front."""
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith("."))


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacement, "exchange", lambda *_: False)


def test_this_file_system_exchanges(tmp_path: Path) -> None:
    """So that the tests below are of both ways."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert replacement.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b" and (tmp_path / "b").is_dir()
    with pytest.raises(FileNotFoundError):
        replacement.exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    "name", ["m[1]", "m*", "m?", "[!a]", "m.", "m ", "-m", ".m", "m;$(x)", "ü\n", "m.partial-old", "x" * 200]
)
def test_any_name_is_built_replaced_and_cleaned(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    foreign = [tmp_path / ".m1.partial-12345678", tmp_path / ".m.partial-old", tmp_path / ".m.partial-12345678"]
    for path in foreign:
        path.mkdir()
    own = tmp_path / f".{name}.partial-0badcafe"
    own.mkdir()
    (own / "a.bin").write_text("of a killed build")
    build(out)
    build(out, "new")
    assert content(out) == "new"
    assert {p.name for p in tmp_path.iterdir()} == {name, *(p.name for p in foreign)}


def test_dots_at_the_end_are_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    for path in (Path("."), Path("../out/."), Path("../gone/../out"), Path(os.path.join("..", "out", "."))):
        monkeypatch.chdir(tmp_path / "out")
        build(path)
    assert content(tmp_path / "out") == "old" and beside(tmp_path / "out") == []


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_its_target_is_built(dangling: bool, tmp_path: Path) -> None:
    target, out = tmp_path / "disk" / "target", tmp_path / "here" / "out"
    for folder in (target.parent, out.parent):
        folder.mkdir()
    if not dangling:
        target.mkdir()
    out.symlink_to(target)
    for text in ("old", "new"):
        build(out, text)
        assert out.is_symlink() and not target.is_symlink() and content(out) == content(target) == text
        assert beside(out) == beside(target) == []


@pytest.mark.parametrize(
    "place", ["/", "//", "/..", "loop", "file", "file/out", "a\0b", "x" * 300, "/proc/out", "/dev/null/out"]
)
def test_a_place_that_takes_no_package_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PackageError, match=r"choose another -o$"):
        build(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine" and sorted(tmp_path.iterdir()) == before


def die_at(step: str, out: Path) -> None:
    """Replace a package and be killed when this function of the module is called, or has just been called."""
    name, _, when = step.partition(" ")
    real = getattr(replacement, name)

    def kill(*rest: Any) -> Any:
        result = real(*rest) if when == "after" else None
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(replacement, name, kill)
    build(out, "new")


def die_between(out: Path) -> None:
    """Replace a package where there is no exchange, and be killed between the two renames."""
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if target == out:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, target)

    Path.rename = rename  # pyright: ignore[reportAttributeAccessIssue]
    replacement.exchange = lambda *_: False
    build(out, "new")


def killed(work: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("write_through", "old"),
        ("replace", "old"),
        ("exchange", "old"),
        ("exchange after", "new"),
        ("replace after", "new"),
    ],
)
@pytest.mark.parametrize("following", [open_package, build], ids=["opened next", "built next"])
def test_a_kill_leaves_the_old_or_the_new_package(
    step: str, left: str, following: Callable[[Path], Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build(out)
    killed(die_at, step, out)
    assert (out / "a.bin").read_text() == left
    assert len(beside(out)) == 2  # the lock, and the other folder
    following(out)
    assert content(out) == ("old" if following is build else left)
    assert beside(out) == []


@pytest.mark.parametrize("following", [open_package, build], ids=["opened next", "built next"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_kill_between_two_renames_loses_nothing(
    empty: bool, following: Callable[[Path], Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build(out)
    killed(die_between, out)
    assert not out.exists()
    if empty:
        out.mkdir()
    following(out)
    assert content(out) == "old" and beside(out) == []


def test_a_build_that_fails_after_such_a_kill_leaves_the_old_package(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out)
    killed(die_between, out)
    with pytest.raises(ZeroDivisionError), building(out):
        raise ZeroDivisionError
    assert content(out) == "old" and beside(out) == []


@pytest.mark.usefixtures("no_exchange")
def test_without_exchange_a_package_is_replaced_too(tmp_path: Path) -> None:
    for text in ("old", "new", "newer"):
        build(tmp_path / "out", text)
        assert content(tmp_path / "out") == text and beside(tmp_path / "out") == []


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("index", [0, 1])
def test_an_error_at_a_rename_leaves_the_old_package(
    index: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, real = tmp_path / "out", [], Path.rename
    build(out)

    def rename(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == index + 1:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PackageError):
        build(out, "new")
    assert content(out) == "old" and beside(out) == []
    assert len(calls) == (1, 3)[index]  # the third puts it back


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ENOENT, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, None])
@pytest.mark.parametrize("new", [False, True])
def test_what_a_disk_answers_is_a_sentence(code: int | None, new: bool, tmp_path: Path) -> None:
    """NumPy's tofile gives no errno."""
    out = tmp_path / "out"
    if not new:
        build(out)
    error = OSError("1024 requested and 0 written") if code is None else OSError(code, os.strerror(code))
    full = code in (None, errno.ENOSPC, errno.EDQUOT)
    with (
        pytest.raises(PackageError, match="the disk is full" if full else "cannot be written"),
        building(out),
    ):
        raise error
    assert beside(out) == [] and (not out.exists() if new else content(out) == "old")


def test_a_file_elsewhere_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "model" / "model.safetensors"
    with (
        pytest.raises(PackageError, match=r"model\.safetensors cannot be read .* restore it"),
        building(tmp_path / "out"),
    ):
        gone.read_bytes()


def test_a_build_is_on_the_disk_before_it_gets_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real, linked = os.fsync, tmp_path / "checkpoint"
    linked.write_text("large")

    def sync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    with building(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        os.link(linked, partial / "sub" / "linked")
        fill(partial, "new")
    assert events == ["sub", *events[1:3], partial.name, tmp_path.name]
    assert set(events[1:3]) == {"a.bin", "package.json"}  # and not what was on the disk already


@pytest.mark.parametrize("there", [False, True])
def test_a_file_in_its_place_keeps_what_it_refers_to_if_the_disk_fails_then(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out.onnx", os.fsync
    if there:
        out.write_text("old")

    def sync(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(PackageError, match="Input/output error"):
        build_file(out)
    assert (tmp_path / out.read_text() / "w.bin").read_text() == "weights"


def test_a_running_build_is_left_alone(tmp_path: Path) -> None:
    """Opening the old package meanwhile neither waits nor takes away what is being written."""
    out = tmp_path / "out"
    build(out)
    with building(out) as partial:
        assert content(out) == "old"
        assert sorted(beside(out)) == [".out.lock", partial.name]
        fill(partial, "new")
    assert content(out) == "new" and beside(out) == []


@pytest.mark.parametrize("build", [building, lambda out: replacement.building_file(out, lambda _: True)])
def test_an_interrupt_while_the_folder_is_made_leaves_none(
    build: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised where the call returns, and the folder is there already."""
    real, made = Path.mkdir, []

    def mkdir(path: Path, *args: Any, **options: Any) -> None:
        real(path, *args, **options)
        if ".partial-" in path.name:
            made.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(KeyboardInterrupt), build(tmp_path / "out"):
        pytest.fail("the folder was not made")
    assert len(made) == 1 and list(tmp_path.iterdir()) == []


def test_builds_of_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    """Also while the file of the lock is made and removed under their hands."""
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            with building(tmp_path / "out") as partial:
                inside.append(number)
                most.append(len(inside))
                fill(partial, str(number))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40 and beside(tmp_path / "out") == []


def test_a_lock_that_is_a_link_is_told(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".out.lock").symlink_to("victim")
    with pytest.raises(PackageError, match="cannot be written"):
        build(tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "mine"


def test_leftovers_that_are_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    (tmp_path / ".out.partial-old").symlink_to("other")
    (tmp_path / ".out.partial-12345678").symlink_to("other")
    build(tmp_path / "out")
    assert content(tmp_path / "out") == "old" and beside(tmp_path / "out") == []
    assert (tmp_path / "other" / "mine").read_text() == "mine"
