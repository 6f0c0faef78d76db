"""Reading what somebody else has written: one owner of the rules for names, files and JSON from outside.

Model folders, packages, adapters, modules and bundles come from anywhere. Whatever reads one goes through here:

- a name is a name: `plain_name` (never a path, an option or a pattern);
- a file is a regular file inside its root, of at most so many bytes: `regular_file`, `read_bytes`;
- JSON has a depth: `read_json`, `parse_json`.

A link may lead elsewhere inside of the root. The hub's cache keeps ``snapshots/<revision>/<file>`` as links into
``blobs/`` beside ``snapshots`` (https://huggingface.co/docs/huggingface_hub/guides/manage-cache), which is allowed too.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn, cast

from qeff_ir.errors import ModelLoadError, QeffError

MAX_JSON_BYTES = 64 << 20
"""Limit of a JSON file; the largest in use, the index of a checkpoint of some hundred thousand tensors, has a tenth."""

MAX_SIDE_FILE_BYTES = 256 << 20
"""Limit of a configuration or tokenizer file; the largest tokenizers have about 40 MB."""

MAX_JSON_DEPTH = 100
"""Limit of lists and objects inside of each other; Python's own recursion ends at about a thousand."""

MAX_NAME_LENGTH = 128
"""Limit of a name that becomes part of a file's name; file systems end at 255 bytes, and names get endings."""


def plain_name(name: object, what: str, error: type[QeffError] = ModelLoadError) -> str:
    """A text from outside that is to become the name of a file or folder, unchanged.

    Args:
        name: The text.
        what: What it names and where it stands, for the message: ``"the architecture in …/config.json"``.
        error: The type to raise.

    Raises:
        QeffError: It is no text, is empty or too long, starts with a dot or a dash, or has another character than
            letters, digits, ``_``, ``-``, ``.`` and ``+``.
    """
    if (
        not isinstance(name, str)
        or not 0 < len(name.encode(errors="replace")) <= MAX_NAME_LENGTH
        or name[0] in ".-"
        or not all(c.isalnum() or c in "_-.+" for c in name)
    ):
        raise error(f"{what} is {_short(name)}, which is not a plain name: use letters, digits, '_', '-' and '.'")
    return name


def regular_file(
    path: Path, root: Path | None = None, *, limit: int | None = None, error: type[QeffError] = ModelLoadError
) -> Path:
    """The real path of a file that may be read: regular, inside its root, and not too large.

    Args:
        path: The file.
        root: Folder that it must stay in, links followed; its own folder when not given.
        limit: Most bytes; `None` for weights, which are never read as a whole.
        error: The type to raise.

    Raises:
        QeffError: It is missing, a folder, a device or a FIFO, too large, or a link that leads out of the root.
    """
    root = path.parent if root is None else root
    try:
        real, home = path.resolve(strict=True), root.resolve(strict=True)
        info = real.stat()
    except (OSError, ValueError, RuntimeError) as cause:  # a name with NUL, a loop of links, no permission
        raise error(f"{_short(path)} cannot be read ({_reason(cause)}): restore it") from cause
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise error(f"{path} leads to {real}, outside of {root}: refused; put the file itself there")
    if not stat.S_ISREG(info.st_mode):
        raise error(f"{path} is not a regular file: refused; put a file there")
    if limit is not None and info.st_size > limit:
        raise error(f"{path} has {info.st_size:,} bytes, at most {limit:,} are read: refused")
    return real


def read_bytes(
    path: Path,
    root: Path | None = None,
    *,
    limit: int = MAX_SIDE_FILE_BYTES,
    error: type[QeffError] = ModelLoadError,
) -> bytes:
    """The bytes of a file; arguments and errors are those of `regular_file`.

    Raises:
        QeffError: See `regular_file`, or reading fails.
    """
    real = regular_file(path, root, limit=limit, error=error)
    try:
        # Without waiting: between the check and here, the file may have become a FIFO.
        with os.fdopen(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            size = os.fstat(file.fileno()).st_size  # of a buffer for `limit` bytes, most would stay empty
            data = file.read(min(size, limit) + 1)
    except OSError as cause:
        raise error(f"{path} cannot be read ({_reason(cause)}): restore it") from cause
    if len(data) > limit:
        raise error(f"{path} has more than {limit:,} bytes: refused")
    if len(data) > size:
        raise error(f"{path} grew while it was read: try again")
    return data


def read_json(
    path: Path, root: Path | None = None, *, limit: int = MAX_JSON_BYTES, error: type[QeffError] = ModelLoadError
) -> Any:
    """What a JSON file holds; arguments are those of `regular_file`.

    Raises:
        QeffError: See `regular_file`, or it is not JSON, or is nested too deeply.
    """
    return parse_json(read_bytes(path, root, limit=limit, error=error), str(path), error)


def parse_json(text: str | bytes, what: str, error: type[QeffError] = ModelLoadError) -> Any:
    """What a JSON text holds.

    Args:
        text: The text, or its bytes as UTF-8.
        what: Where it comes from, for the message.
        error: The type to raise.

    Raises:
        QeffError: It is not JSON, or lists and objects are nested more than `MAX_JSON_DEPTH` deep.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} cannot be read as JSON ({_reason(cause)}): restore it") from cause
    level, depth = [data], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise error(f"{what} cannot be read as JSON (nested more than {MAX_JSON_DEPTH} deep): restore it")
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return data


def list_folder(folder: Path, pattern: str = "*", *, error: type[QeffError]) -> list[Path]:
    """What lies in a folder, sorted; `Path.glob` takes a folder that the disk does not list for an empty one.

    Args:
        folder: The folder.
        pattern: Of the names, as `fnmatch` takes it.
        error: The type to raise.

    Raises:
        QeffError: It cannot be listed.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, pattern))
    except OSError as cause:
        raise error(f"{_short(folder)} cannot be listed ({_reason(cause)}): restore it") from cause


def files_below(root: Path, pattern: str = "*", *, error: type[QeffError] | None = None) -> list[Path]:
    """Every file below a folder, sorted; a link to a folder counts as one, and is not followed.

    `os.walk` and `Path.rglob` leave out a folder that the disk does not list, as if it were empty.

    Args:
        root: The folder.
        pattern: Of the files' names, as `fnmatch` takes it.
        error: The type to raise in place of an `OSError`.

    Raises:
        OSError: A folder cannot be listed.
        QeffError: The same, where a type is given.
    """
    found: list[Path] = []
    try:
        for base, folders, names in os.walk(root, onerror=_raise):
            here = Path(base)
            names += [name for name in folders if (here / name).is_symlink()]
            found += [here / name for name in names if fnmatch.fnmatchcase(name, pattern)]
    except OSError as cause:
        if error is None:
            raise
        raise error(f"{_short(cause.filename)} cannot be listed ({_reason(cause)}): restore it") from cause
    return sorted(found)


def _raise(error: OSError) -> NoReturn:
    raise error


def path_of(value: object, what: str, error: type[QeffError] = ModelLoadError) -> Path:
    """What a caller has given as a path, ``~`` resolved; whether there is such a file is another question.

    Args:
        value: The text or path.
        what: The argument, for the message.
        error: The type to raise.

    Raises:
        QeffError: It is something else, or no file of this machine can have such a name.
    """
    if not isinstance(value, str | os.PathLike) or not str(value):  # pyright: ignore[reportUnknownArgumentType]
        raise error(f"{what} is {_short(value)}: give a path")
    try:
        path = Path(cast("str | os.PathLike[str]", value)).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError, TypeError) as cause:  # NUL, too long; no home; no permission; bytes
        raise error(f"{what} is {_short(value)}, which is not a path here ({_reason(cause)}): give another") from cause
    return path


def _reason(cause: BaseException) -> str:
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return (str(cause).splitlines() or [type(cause).__name__])[0][:200]


def _short(value: object) -> str:
    text = ascii(str(value)) if isinstance(value, str | Path) else repr(value)
    return text if len(text) <= 120 else text[:100] + "…'"
