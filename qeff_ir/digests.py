"""SHA-256 of files and parts of files, taken once on a machine.

A digest is remembered under the file's device, inode, size and times. The time of the last status change (ctime) cannot
be set from outside: a file that was rewritten, or that came by ``cp -p`` or rsync with the time of its original, is
digested anew. So is one whose number of hard links changed, which costs time and hides nothing.

What is remembered of large files lies in ``digests.json`` below `cache_root`, and is as good as gone when that file is
damaged or cannot be written. Several processes may write it: each replaces it as a whole, and what one of them loses is
digested again.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from qeff_ir.errors import PackageError, QeffError
from qeff_ir.home import cache_root
from qeff_ir.reading import read_json

FILE = "digests.json"

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size, mtime and ctime (ns)."""

_CHUNK = 1 << 24
_WORTH_KEEPING = 1 << 20
"""Bytes from which on a digest is kept for other processes; a smaller file is read again in a millisecond."""
_MOST = 4096
"""Entries of the file; the oldest go first."""
_CLOCK_NS = 20_000_000
"""Within this time two changes may get the same ctime: the kernel's clock of files ticks 100 times a second."""
_SLOW = 2.0
"""Seconds after which progress is told."""

_taken: dict[str, str] = {}
_guard = threading.Lock()
_tell: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar("tell", default=None)


@contextlib.contextmanager
def telling(tell: Callable[[str], None]) -> Generator[None]:
    """Say by `tell` how far reading has come, instead of by a progress bar."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


def stamp(path: Path) -> Stamp:
    """What changes with every change of a file."""
    info = path.stat()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def digest_file(
    path: Path,
    offset: int = 0,
    length: int | None = None,
    convert: tuple[str, Callable[[bytes], bytes]] | None = None,
) -> str:
    """SHA-256 of a file, or of `length` bytes from `offset` on, in hex; read only if it is not remembered.

    Args:
        path: The file.
        offset: First byte.
        length: Bytes; all that follow by default.
        convert: A name and a function, applied to pieces of 16 MiB before they are digested.

    Raises:
        PackageError: The file changes while it is read, or ends before the part does.
    """
    now, before = time.time_ns(), stamp(path)
    key = _key(before, offset, length) + (f":{convert[0]}" if convert else "")
    known = _look_up(key, before[2])
    if known is not None:
        return known
    found = _read(path, offset, before[2] - offset if length is None else length, convert[1] if convert else bytes)
    if stamp(path) != before:
        raise PackageError(f"{path} was changed while it was read: try again when nobody writes it")
    if before[4] < now - _CLOCK_NS:  # otherwise a later change could leave no trace
        _keep({key: found}, before[2])
    return found


def same_digest(copy: Path, original: Path, original_stamp: Stamp) -> None:
    """Remember that a new copy of a file, or a further hard link to it, has its digest, where that one is known.

    Args:
        copy: The copy, compared with the original or made by the file system.
        original: The original.
        original_stamp: Its stamp before the copy was made.
    """
    known = _look_up(_key(original_stamp, 0, None), original_stamp[2])
    if known is None or stamp(original)[1:4] != original_stamp[1:4]:
        return
    _keep({_key(stamp(copy), 0, None): known, _key(stamp(original), 0, None): known}, original_stamp[2])


def settle() -> None:
    """Wait until what was written before can be told from what is written after, so that it can be remembered."""
    time.sleep(1.5 * _CLOCK_NS / 1e9)


def _key(found: Stamp, offset: int, length: int | None) -> str:
    whole = offset == 0 and length in (None, found[2])
    return ":".join(map(str, found if whole else (*found, offset, length)))


def _look_up(key: str, size: int) -> str | None:
    with _guard:
        known = _taken.get(key)
    if known is None and size >= _WORTH_KEEPING:
        known = _load().get(key)
    return known


def _keep(entries: dict[str, str], size: int) -> None:
    with _guard:
        _taken.update(entries)
        while len(_taken) > _MOST:
            del _taken[next(iter(_taken))]
    if size >= _WORTH_KEEPING:
        with contextlib.suppress(OSError):
            _store(entries)


def _path() -> Path:
    return cache_root() / FILE


def _load() -> dict[str, str]:
    """What the file has; nothing when there is none, or it is damaged."""
    try:
        if not _path().is_file():
            return {}
        data: Any = read_json(_path(), error=PackageError)
    except (QeffError, OSError):
        return {}
    items = data.items() if isinstance(data, dict) else ()
    return {k: v for k, v in items if isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v)}


def _store(entries: dict[str, str]) -> None:
    data = {**{k: v for k, v in _load().items() if k not in entries}, **entries}
    data = dict(list(data.items())[-_MOST:])
    _path().parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{FILE}.", dir=_path().parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file)
        os.replace(name, _path())
    except BaseException:
        os.unlink(name)
        raise


def _read(path: Path, offset: int, length: int, convert: Callable[[bytes], bytes]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, _progress(path, length) as done:
        file.seek(offset)
        while length > 0:
            chunk = file.read(min(_CHUNK, length))
            if not chunk:
                raise PackageError(f"{path} ends before its data do: restore it")
            digest.update(convert(chunk))
            length -= len(chunk)
            done(len(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(path: Path, total: int) -> Generator[Callable[[int], None]]:
    """Once it has taken two seconds, tell whoever asked by `telling`, or the terminal where there is one."""
    tell = _tell.get()
    started, read, said = time.monotonic(), 0, -1
    with contextlib.ExitStack() as stack:

        def done(count: int) -> None:
            nonlocal tell, read, said
            read += count
            percent = 100 * read // total
            if percent == said or time.monotonic() - started < _SLOW:
                return
            if tell is None:
                tell = stack.enter_context(Console(stderr=True).status("")).update if sys.stderr.isatty() else _silence
            said = percent
            tell(f"Reading {path.name} for the first time here, {percent} %")

        from rich.console import Console

        yield done


def _silence(_text: str) -> None:
    """Where nobody listens."""
