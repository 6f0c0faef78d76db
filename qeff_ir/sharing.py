"""Getting a file of weights into a folder without writing its bytes again, where the file system can do that.

1. A clone (``FICLONE``: btrfs, XFS, bcachefs, ZFS, overlayfs on them) shares the blocks and is a file of its own: every
   tool reads it, and who rewrites the original in place does not change it. It is taken wherever there is one.
2. Elsewhere (ext4, tmpfs, another disk) nothing that can be shared is read by onnx, whose loader, checker and all that
   builds on them (onnx-graphsurgeon, onnx_ir) demand a regular file below the folder, reached without symbolic links,
   with one hard link (``open_external_data`` of onnx 1.23). So files are copied, holes left out, while all of them
   together take at most `COPY_LIMIT` on the disk; from 1 GiB on, a warning says so.
3. Beyond that, a checkpoint's files get a hard link: a package of 140 GB is not written in silence. ONNX Runtime and
   Netron read it, onnx does not; the command line says so, and ``QEFF_WEIGHTS=copy`` copies whatever the size is.
   ``QEFF_WEIGHTS=link`` links whatever the size is.

A file with a hard link changes with its original. A package is checked against its manifest at every open, so that a
checkpoint that was rewritten in place ends in a sentence; a session that is open already reads what is there (Linux
ends a process with SIGBUS that reads mapped memory behind the end of a truncated file).

A file that an ONNX file names is never linked: onnx would refuse that ONNX file, which is the user's, from then on.

Several programs of one package that take the same file have it once (`together`): a clone, or else a hard link of the
first one's, which ONNX Runtime reads and onnx does not; ``QEFF_WEIGHTS=copy`` copies it again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from qeff_ir.digests import same_digest, stamp
from qeff_ir.errors import PackageError

WEIGHTS = "weights"
"""Folder of the weight files, beside the ONNX file; ONNX takes only paths below its own folder."""

COPY_LIMIT = 8 << 30
"""Bytes on the disk up to which the weights of a package are copied where they cannot be cloned: seconds, not minutes,
and about what a tool that reads them whole can hold in memory."""

_WORTH_SAYING = 1 << 30
"""Bytes from which on a copy is announced."""

VARIABLE = "QEFF_WEIGHTS"

Choice = Literal["auto", "copy", "link"]

_CHUNK = 1 << 24
_FICLONE = 0x40049409
_NO_CLONE = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES})
"""What a file system answers that cannot link to a file: it is another one, has no hard links, or no more of them."""


def choice() -> Choice:
    """What the user has chosen by ``$QEFF_WEIGHTS``.

    Raises:
        PackageError: It is neither ``copy`` nor ``link``.
    """
    found = os.environ.get(VARIABLE, "")
    if found in ("copy", "link"):
        return found
    if found:
        raise PackageError(f"${VARIABLE} is '{found}': set it to copy or link, or to nothing")
    return "auto"


_PLACED: ContextVar[dict[Path, Path] | None] = ContextVar("placed", default=None)
"""Inside of `together`: where each file is already."""


@contextlib.contextmanager
def together(placed: dict[Path, Path]) -> Generator[None]:
    """What is shared in the block belongs together: a file that is asked for again gets a link to what it got first.

    Args:
        placed: Where each file is already; filled for the next block.
    """
    token = _PLACED.set(placed)
    try:
        yield
    finally:
        _PLACED.reset(token)


def share(files: Mapping[Path, Path], linkable: Iterable[Path], *, prefer_links: bool = False) -> None:
    """Make files appear under other names: cloned, or copied, or hard-linked.

    Args:
        files: The new path of each file; nothing is there yet.
        linkable: Those that may get a hard link.
        prefer_links: Link what may be linked, whatever its size.

    Raises:
        PackageError: A copy differs from its original.
        OSError: A file is gone, or the disk is full or fails.
    """
    wanted = choice()
    known = _PLACED.get()
    placed = {} if known is None else known
    for source, target in files.items():
        if source in placed:
            before = stamp(source)
            if not _clone(placed[source], target) and not (wanted != "copy" and _link(placed[source], target)):
                _copy(placed[source], target)
            same_digest(target, source, before)
    files = {source: target for source, target in files.items() if source not in placed}
    may = set(linkable)
    size = sum(source.stat().st_blocks * 512 for source in files)
    link = wanted == "link" or (wanted == "auto" and (prefer_links or size > COPY_LIMIT))
    told = size < _WORTH_SAYING
    for source, target in files.items():
        before = stamp(source)
        if not _clone(source, target) and not (link and source in may and _link(source, target)):
            if not told:
                warnings.warn(
                    f"copying {size / 1e9:.1f} GB of weights to {target.parent}: this file system has no clones; "
                    f"{VARIABLE}=link shares a checkpoint's files, which onnx then does not read",
                    stacklevel=2,
                )
                told = True
            _copy(source, target)
        same_digest(target, source, before)
        placed[source] = target


def _clone(source: Path, target: Path) -> bool:
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new, _FICLONE, old.fileno())
            return True
        except OSError as error:
            if error.errno not in _NO_CLONE:
                raise
    target.unlink()
    return False


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    """Copy a file, its holes as holes, and compare the copy with it; memory holds two chunks.

    Raises:
        PackageError: The copy differs.
    """
    with source.open("rb") as old, target.open("xb+") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        for start, end in _data(old.fileno(), size):
            while start < end:
                start += _copy_some(old.fileno(), new.fileno(), start, end - start)
        for start, end in _data(old.fileno(), size):
            for at in range(start, end, _CHUNK):
                count = min(_CHUNK, end - at)
                if os.pread(old.fileno(), count, at) != os.pread(new.fileno(), count, at):
                    raise PackageError(
                        f"the copy of {source} to {target} is not equal to it: check the disk, and compile again"
                    )


def _copy_some(old: int, new: int, start: int, count: int) -> int:
    """Copy up to so many bytes at a place, inside the kernel where it can; returns how many."""
    # Not there on every system, nor for every pair of file systems: whatever else is wrong shows below.
    with contextlib.suppress(OSError, AttributeError):
        done = os.copy_file_range(old, new, min(count, 1 << 30), start, start)
        if done:
            return done
    chunk = os.pread(old, min(count, _CHUNK), start)
    if not chunk:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return os.pwrite(new, chunk, start)


def _data(file: int, size: int) -> Iterable[tuple[int, int]]:
    """Where a file has data: first byte and end of each stretch."""
    at = 0
    while at < size:
        try:
            at = os.lseek(file, at, os.SEEK_DATA)
            end = os.lseek(file, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            end = size
        yield at, end
        at = end
