"""Packages are whole or not there, and tell when they were touched."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qeff_ir.errors import PackageError
from qeff_ir.package import (
    FORMAT_VERSION,
    MAIN,
    MANIFEST,
    Manifest,
    ProgramRecord,
    building,
    open_package,
    opened,
    seal,
)


def fill(folder: Path, text: str = "content") -> None:
    (folder / "sub").mkdir()
    (folder / "a.bin").write_text(text)
    (folder / "sub" / "b.bin").write_text(text * 2)
    seal(folder, Manifest("onnxruntime", "key", True, {}, {MAIN: ProgramRecord("Model", {})}))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    with building(tmp_path / "out") as partial:
        fill(partial)
    return tmp_path / "out"


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if ".partial-" in p.name)


def test_a_whole_package_opens(package: Path) -> None:
    manifest = open_package(package)
    assert set(manifest.files) == {"a.bin", "sub/b.bin"}
    assert (manifest.target, manifest.model, manifest.key, manifest.compiled) == ("onnxruntime", "Model", "key", True)
    assert hidden(package.parent) == []


def test_a_missing_file_is_told(package: Path) -> None:
    (package / "sub" / "b.bin").unlink()
    with pytest.raises(PackageError, match=r"sub/b\.bin of the package .* is missing: compile the model again"):
        open_package(package)


@pytest.mark.parametrize("text", ["c0ntent", "longer content", ""])
def test_an_altered_file_is_told(text: str, package: Path) -> None:
    (package / "a.bin").write_text(text)
    with pytest.raises(PackageError, match=r"a\.bin of the package .* was altered"):
        open_package(package)


def test_a_copied_package_opens(package: Path) -> None:
    """Other times, the same bytes: the digest decides."""
    os.utime(package / "a.bin", (1, 1))
    open_package(package)


@pytest.mark.parametrize("version", [99, FORMAT_VERSION - 1, FORMAT_VERSION + 1, 0])
def test_another_version_is_told(version: int, package: Path) -> None:
    path = package / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    message = f"version {version}, this qeff-ir reads version {FORMAT_VERSION}: compile the model again"
    with pytest.raises(PackageError, match=message):
        open_package(package)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 5}', '{"version": 5, "files": {"a": {}}}', "\x00", "[" * 100_000]
)
def test_a_damaged_manifest_is_told(text: str, package: Path) -> None:
    (package / MANIFEST).write_text(text)
    with pytest.raises(PackageError, match="is damaged"):
        open_package(package)


def test_a_folder_without_a_manifest_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"is not a qeff package \(it has no package.json\)"):
        open_package(tmp_path)


def test_a_manifest_that_names_a_file_outside_is_refused(package: Path) -> None:
    (package.parent / "secret").write_text("x")
    path = package / MANIFEST
    data = json.loads(path.read_text())
    data["files"]["../secret"] = data["files"].pop("a.bin")
    path.write_text(json.dumps(data))
    with pytest.raises(PackageError, match="a file outside the package: refused"):
        open_package(package)


def fail(out: Path) -> None:
    with building(out) as partial:
        fill(partial, "new")
        raise ZeroDivisionError


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []


def test_a_failed_rebuild_leaves_the_old_package(package: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(package)
    open_package(package)
    assert (package / "a.bin").read_text() == "content"


def test_a_rebuild_takes_the_place_of_the_old_package(package: Path) -> None:
    (package / "stray").write_text("of before")
    with building(package) as partial:
        fill(partial, "new")
        assert (package / "a.bin").read_text() == "content"  # still there while the new one is built
    open_package(package)
    assert (package / "a.bin").read_text() == "new"
    assert not (package / "stray").exists()


def test_a_block_that_builds_nothing_leaves_the_package(package: Path) -> None:
    """Another process may have built it meanwhile."""
    with building(package):
        pass
    open_package(package)
    assert (package / "a.bin").read_text() == "content"
    assert hidden(package.parent) == []


def test_what_is_no_package_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(PackageError, match="exists and is not a qeff package: remove it"), building(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with building(tmp_path / "out") as partial:
        fill(partial)
    open_package(tmp_path / "out")


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="the disk is full"), building(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert hidden(tmp_path) == []


def _build_and_die(out: Path) -> None:
    with building(out) as partial:
        fill(partial)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_build_leaves_no_package_and_the_next_one_works(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(tmp_path / "out",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 1
    assert not (tmp_path / "out").exists()
    with building(tmp_path / "out") as partial:
        fill(partial)
    open_package(tmp_path / "out")
    assert hidden(tmp_path) == []


def test_a_folder_that_takes_no_files_is_told() -> None:
    out = Path("/proc/qeff-out")
    with (
        pytest.raises(PackageError, match=r"cannot be written .its folder takes no files.: choose another -o"),
        building(out),
    ):
        pass


def reseal(package: Path, **fields: Any) -> None:
    """Change fields of the manifest."""
    path = package / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"files": {}}, {"files": []}, {"files": {"a.bin": {"bytes": "7", "sha256": "x"}}}, {"key": 5}, {"options": []},
        {"compiled": 1}, {"tables": {"t": {}}}, {"version": True}, {"version": [2]}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_other_fields_is_told(fields: dict[str, Any], package: Path) -> None:
    reseal(package, **fields)
    with pytest.raises(PackageError, match=r"is damaged|is a package of format version"):
        open_package(package)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "..", "sub/../../out/a.bin", "a\0b", "", "x" * 5000, "loop", "sub", "pipe"]
)
def test_a_manifest_that_names_what_no_package_holds_is_told(name: str, package: Path) -> None:
    (package / "loop").symlink_to("loop")
    os.mkfifo(package / "pipe")
    files = json.loads((package / MANIFEST).read_text())["files"]
    reseal(package, files={**files, name: files["a.bin"]})
    with pytest.raises(
        PackageError, match=r"outside the package: refused|is missing|cannot be read|not a regular file"
    ):
        open_package(package)


@pytest.mark.parametrize("name", ["generation_config.json", "sub/new.json", "sub/linked", "more/x"])
def test_a_file_that_is_not_listed_is_refused(name: str, package: Path) -> None:
    """transformers and ONNX Runtime would read it by its name."""
    (package / "more").mkdir()
    if name == "sub/linked":
        (package / name).symlink_to(package.parent)
    else:
        (package / name).write_text("{}")
    with pytest.raises(PackageError, match=f"{name} of the package .* is not in its manifest: remove it"):
        open_package(package)


def test_a_hidden_file_may_be_there(package: Path) -> None:
    (package / "sub" / ".DS_Store").write_text("")
    open_package(package)


def test_a_change_that_keeps_size_and_time_is_told(package: Path) -> None:
    """Copies keep times (cp -p, rsync): the time of a change says nothing, the one of the file's status does."""
    path = package / "a.bin"
    open_package(package)
    before = path.stat()
    path.write_text("c0ntent")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(PackageError, match=r"a\.bin of the package .* was altered"):
        open_package(package)


def test_a_package_that_is_changed_while_it_is_read_is_told(package: Path) -> None:
    def read() -> None:
        with opened(package, "key"):
            (package / "a.bin").write_text("c0ntent")

    with pytest.raises(PackageError, match=r"a\.bin of the package .* was altered"):
        read()


def test_another_package_in_its_place_is_told(package: Path) -> None:
    with pytest.raises(PackageError, match="was replaced by another package since it was opened"), opened(package, "k"):
        pass
    with opened(package, "key") as manifest:
        assert manifest.key == "key"


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError("deep"), MemoryError(), OSError(5, "I/O"), ValueError("a\nb")]
)
def test_what_a_library_says_of_damage_is_a_sentence(error: Exception, package: Path) -> None:
    text = r"^.*out cannot be read \([A-Za-z]+.*\): compile the model again$"
    with pytest.raises(PackageError, match=text) as told, opened(package):
        raise error
    assert told.value.__cause__ is error
