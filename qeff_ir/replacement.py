"""A folder that is whole or not there, also when its builder is killed or its disk fails.

A folder `OUT` is built as ``.OUT.partial-ID`` beside its place, under the lock ``.OUT.lock``, written through to the
disk, and put in its place in one step: a rename where there was nothing, else an exchange with what was there
(``renameat2`` with ``RENAME_EXCHANGE``). On a file system without exchange the old folder is ``.OUT.partial-old`` for a
moment. A kill at any time leaves `OUT` as it was or as it shall be, or, within that moment, ``.OUT.partial-old``, which
`put_right` puts back. It removes what else a kill has left, and is called whenever the folder is built or opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NoReturn

from qeff_ir.errors import PackageError

_OLD = "old"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What the kernel or a file system answers that cannot exchange two names."""
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a file system answers that cannot write a folder through to a disk."""
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def real_place(out: Path) -> Path:
    """Where a folder is really built: links followed, so that a link stays one and its target is replaced.

    Raises:
        PackageError: It is the root of a file system, or no path at all.
    """
    try:
        found = Path(os.path.realpath(out.expanduser()))
    except (OSError, ValueError, RuntimeError) as error:
        raise PackageError(f"{str(out)!a} cannot be written ({error}): choose another -o") from error
    if not found.name:
        raise PackageError(f"{out} is the root of the file system: choose another -o")
    return found


@contextlib.contextmanager
def building(out: Path, ours: Callable[[Path], bool], kind: str = "a qeff package") -> Generator[Path]:
    """A new folder that becomes `out` when the block ends without an error; otherwise nothing of it stays.

    Only one build of `out` runs at a time. What `out` held before is replaced in one step. A block that puts nothing
    into the folder, because another process has built `out` meanwhile, leaves it as it is.

    Args:
        out: The folder.
        ours: Whether a folder may be replaced. An empty one always may.
        kind: What such a folder is, for the message about another one.

    Raises:
        PackageError: `out` holds something else, or the disk is full, fails, or cannot be written.
    """
    out = real_place(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _put_right(out)
            _refuse_foreign(out, ours, kind)
            partial = _hidden(out, uuid.uuid4().hex[:8])
            try:  # an interrupt may come before the folder's making has returned
                partial.mkdir()
                yield partial
                if any(partial.iterdir()):
                    _refuse_foreign(out, ours, kind)
                    write_through(partial)
                    replace(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # what was not finished, or what was replaced


@contextlib.contextmanager
def building_file(out: Path, ours: Callable[[Path], bool]) -> Generator[tuple[Path, str]]:
    """A new file, with a folder of what it refers to, that takes the place of `out` when the block ends well.

    The block puts into the folder that it gets a file with the name of `out`, and beside it, if needed, the folder with
    the name that it gets: another one at each build, so that the old file and what it refers to stay whole until the
    new file replaces the old one.

    Args:
        out: The file.
        ours: Whether a file may be replaced.

    Raises:
        PackageError: See `building`.
    """
    out = real_place(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _put_right(out)
            if out.exists() and not (out.is_file() and ours(out)):
                raise PackageError(f"{out} exists and was not written by qeff: remove it, or choose another -o")
            end = uuid.uuid4().hex[:8]
            partial, data = _hidden(out, end), out.parent / f"{out.stem}.weights-{end}"
            placed = False
            try:  # see `building`
                partial.mkdir()
                yield partial, data.name
                write_through(partial)
                if (partial / data.name).exists():
                    (partial / data.name).rename(data)
                (partial / out.name).replace(out)
                placed = True  # from here on, the data is what the new file refers to
                _sync(out.parent)
            except BaseException:
                if not placed:
                    shutil.rmtree(data, ignore_errors=True)
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            for other in _data_folders(out):
                if other != data:
                    shutil.rmtree(other, ignore_errors=True)


def put_right(out: Path) -> None:
    """Put back, or remove, what a killed build of `out` has left; nothing while somebody builds it."""
    with contextlib.suppress(OSError, PackageError):  # a folder that is read only has to be opened all the same
        out = real_place(out)
        if _leftovers(out):
            with _locked(out, wait=False):
                _put_right(out)


@contextlib.contextmanager
def disk_errors(out: Path) -> Generator[None]:
    """Turn what a disk answers while `out` is written into a sentence.

    Raises:
        PackageError: In place of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        # NumPy tells of bytes that were not written without an errno.
        if error.errno in _FULL or error.errno is None:
            reason = f"the disk is full while writing {out}: free some space; nothing was left behind"
        elif _is_read(error, out):
            reason = f"{error.filename} cannot be read ({error.strerror}) while writing {out}: restore it"
        else:
            reason = f"{out} cannot be written ({error.strerror}): choose another -o"
        raise PackageError(reason) from error


def write_through(folder: Path) -> None:
    """Wait until a folder is on its disk; not for files with other names outside, which were there before."""

    def failed(error: OSError) -> NoReturn:  # otherwise a folder that is not listed is left out
        raise error

    for base, _, names in os.walk(folder, topdown=False, onerror=failed):
        for name in names:
            path = os.path.join(base, name)
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
                _sync(path)
        _sync(base)


def replace(new: Path, out: Path) -> None:
    """Put a folder in the place of another one, which then has its name or is gone; afterwards it is on the disk.

    Raises:
        OSError: It cannot be done; what was in the place is there still, or again.
    """
    if not out.exists():
        new.rename(out)
    elif not exchange(new, out):
        old = _hidden(out, _OLD)
        try:
            out.rename(old)
            new.rename(out)
        except BaseException:
            if not out.exists() and old.exists():
                old.rename(out)
            raise
        _sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
        return
    _sync(out.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change names in one step; `False` where that cannot be done.

    Raises:
        OSError: The file system can, and did not.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _hidden(out: Path, end: str) -> Path:
    return out.parent / f".{out.name}.partial-{end}"


def _leftovers(out: Path) -> list[Path]:
    """What a build of `out` that was killed, or runs, has beside it."""
    pattern = re.compile(re.escape(f".{out.name}.") + rf"(lock|partial-({_OLD}|[0-9a-f]{{8}}))")
    return sorted(out.parent / name for name in os.listdir(out.parent) if pattern.fullmatch(name))


def _data_folders(out: Path) -> list[Path]:
    """What a file that was built refers to, and what earlier builds that were killed have left."""
    pattern = re.compile(re.escape(f"{out.stem}.weights-") + "[0-9a-f]{8}")
    found = [out.parent / name for name in os.listdir(out.parent) if pattern.fullmatch(name)]
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _put_right(out: Path) -> None:
    """See `put_right`; the caller has the lock."""
    old = _hidden(out, _OLD)
    if old.is_dir() and not old.is_symlink() and (not out.exists() or _is_empty(out)):
        old.rename(out)
        _sync(out.parent)
    for path in _leftovers(out):
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _refuse_foreign(out: Path, ours: Callable[[Path], bool], kind: str) -> None:
    if out.exists() and not _is_empty(out) and not (out.is_dir() and ours(out)):
        raise PackageError(f"{out} exists and is not {kind}: remove it, or choose another -o")


@contextlib.contextmanager
def _locked(out: Path, *, wait: bool = True) -> Generator[None]:
    """Keep other processes and threads from building `out`; the lock's file is gone afterwards.

    Raises:
        BlockingIOError: Somebody builds it, and `wait` is false.
    """
    path = out.parent / f".{out.name}.lock"
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError as error:
            raise PackageError(f"{out} cannot be written (its folder takes no files): choose another -o") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.lstat(path)):
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever had the lock has removed its file: a new one counts
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(handle)


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def _is_read(error: OSError, out: Path) -> bool:
    """Whether the error is about a file elsewhere, such as a checkpoint's."""
    if not isinstance(error.filename, str | bytes):
        return False
    name = Path(os.fsdecode(error.filename))
    own = (
        str(name).startswith(str(out.parent / f".{out.name}.")) or name.is_relative_to(out) or out.is_relative_to(name)
    )
    return name.is_absolute() and not own
