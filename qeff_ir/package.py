"""A package on disk: a folder that is whole or not there, with a manifest that tells when a file is missing or altered.

    OUT/package.json      the manifest, written last
    OUT/huggingface/      configuration and tokenizer
    OUT/weights/          hard links to the checkpoint's files, and tensors that exist nowhere else
    OUT/...               what the target's `emit` and `compile` wrote

A package is built in a hidden folder beside `OUT` and renamed when it is complete, under a lock. A build that is killed
leaves only the hidden folder, which the next build removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from qeff_ir.errors import PackageError

MANIFEST = "package.json"
SIDE_FOLDER = "huggingface"
FORMAT_VERSION = 1
"""Version of the manifest and of the folder; a package of another version is refused."""

_CHUNK = 1 << 24
_UNWRITABLE = frozenset(
    {errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EFBIG, errno.ENAMETOOLONG}
)
"""What the place that the user chose for a package can answer, a full disk apart."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file.

    Attributes:
        bytes: Size.
        sha256: Digest.
        mtime_ns: Time of the last change when the digest was taken; while size and time stay, the digest is believed.
    """

    bytes: int
    sha256: str
    mtime_ns: int


@dataclass
class Manifest:
    """The facts about a package.

    Attributes:
        target: Name of the backend.
        model: Name of the model class.
        key: Digest of all that can change the package.
        compiled: Whether the target's compiler ran; `False` after an emit only.
        options: The compile options as plain data.
        report: What the passes did, see `qeff_ir.passing.manager.Report`.
        files: Every file of the package by path relative to it.
        version: Format version.
    """

    target: str
    model: str
    key: str
    compiled: bool
    options: dict[str, Any]
    report: dict[str, Any]
    files: dict[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    version: int = FORMAT_VERSION


def digest_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hex; `progress` is told the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def is_package(folder: Path) -> bool:
    """Whether a folder claims to be a package."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest without looking at the other files.

    Raises:
        PackageError: There is none, it is damaged, or it is of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise PackageError(f"{folder} is not a qeff package (it has no {MANIFEST}): compile the model with -o {folder}")
    try:
        data = json.loads(path.read_text())
        if data["version"] != FORMAT_VERSION:
            raise PackageError(
                f"{folder} is a package of format version {data['version']}, this qeff-ir reads version "
                f"{FORMAT_VERSION}: compile the model again"
            )
        files = {name: FileRecord(**record) for name, record in data.pop("files").items()}
        return Manifest(files=files, **data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{path} is damaged ({error}): compile the model again") from error


def open_package(folder: Path) -> Manifest:
    """Read a package's manifest and check every file against it.

    Raises:
        PackageError: As `read_manifest`, or a file is missing or altered.
    """
    manifest = read_manifest(folder)
    root = folder.resolve()
    for name, record in manifest.files.items():
        path = root / name
        if not path.resolve().is_relative_to(root):
            raise PackageError(f"{folder / MANIFEST} names '{name}', a file outside the package: refused")
        if not path.is_file():
            raise PackageError(f"{name} of the package {folder} is missing: compile the model again")
        stat = path.stat()
        same = stat.st_size == record.bytes and stat.st_mtime_ns == record.mtime_ns
        if not same and (stat.st_size != record.bytes or digest_file(path) != record.sha256):
            raise PackageError(
                f"{name} of the package {folder} was altered after it was compiled: compile the model again"
            )
    return manifest


@contextlib.contextmanager
def building(out: Path) -> Generator[Path]:
    """A new folder that becomes `out` when the block ends without an error; otherwise nothing of it stays.

    Only one build of `out` runs at a time. What `out` held before is replaced at once, and only if it was a package; a
    block that puts nothing into the folder, because another process has built `out` meanwhile, leaves it as it is.

    Raises:
        PackageError: `out` holds something else, or the disk is full or cannot be written.
    """
    out = out.absolute()
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(out)
        with FileLock(out.parent / f".{out.name}.lock"):
            for leftover in out.parent.glob(f".{out.name}.partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if out.exists() and not is_package(out) and (not out.is_dir() or any(out.iterdir())):
                raise PackageError(f"{out} exists and is not a qeff package: remove it, or choose another -o")
            partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
            partial.mkdir()
            try:
                yield partial
                if any(partial.iterdir()):
                    _replace(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def record_file(path: Path) -> FileRecord:
    """Size, digest and time of a file as it is now."""
    stat = path.stat()
    return FileRecord(stat.st_size, digest_file(path), stat.st_mtime_ns)


def seal(folder: Path, manifest: Manifest, known: dict[Path, FileRecord] | None = None) -> None:
    """Record every file of a folder in the manifest and write it: the last step of a build.

    Args:
        folder: The folder.
        manifest: Its `files` are filled.
        known: Records that were taken already, by resolved path of any hard link of the file.

    Raises:
        PackageError: Such a file is no longer what its record says.
    """
    records = {_inode(path): record for path, record in (known or {}).items()}
    manifest.files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        stat = path.stat()
        record = records.get(_inode(path)) or record_file(path)
        if (stat.st_size, stat.st_mtime_ns) != (record.bytes, record.mtime_ns):
            raise PackageError(f"{path.name} was changed while the model was compiled: compile it again")
        manifest.files[path.relative_to(folder).as_posix()] = record
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True))


def _try_to_write(out: Path) -> None:
    """Tell of a folder that takes no file; the lock would wait for it for ever."""
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except FileNotFoundError as error:
        raise PackageError(f"{out} cannot be written (its folder takes no files): choose another -o") from error


def _inode(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _replace(new: Path, out: Path) -> None:
    if out.exists():
        old = out.parent / f".{out.name}.partial-old"
        out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(out)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PackageError(
                f"the disk is full while writing {out}: free some space; nothing was left behind"
            ) from error
        if error.errno in _UNWRITABLE:
            raise PackageError(f"{out} cannot be written ({error.strerror}): choose another -o") from error
        raise
