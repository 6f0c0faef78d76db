"""A package on disk: a folder that is whole or not there, with a manifest that tells when a file is missing or altered.

    OUT/package.json      the manifest, written last
    OUT/huggingface/      configuration and tokenizer
    OUT/weights/          the checkpoint's files (see `qeff_ir.storage`), and tensors that exist nowhere else
    OUT/...               what the target's `emit` and `compile` wrote
    OUT/PROGRAM/...       the same of each further program; files of weights that it shares are there once (links)

The manifest seals every file. One that it does not name is refused, since whoever reads a folder by the names in it
(transformers, ONNX Runtime) would take it; hidden files, which nobody reads, may be there. Digests are taken once on a
machine, see `qeff_ir.digests`. How a folder gets its place, see `qeff_ir.replacement`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qeff_ir import replacement
from qeff_ir.digests import digest_file, settle, stamp
from qeff_ir.errors import PackageError, QeffError
from qeff_ir.reading import files_below, plain_name, read_json, regular_file
from qeff_ir.sharing import WEIGHTS

MANIFEST = "package.json"
SIDE_FOLDER = "huggingface"
MAIN = "main"
"""The program that lies in the package's own folder; any other lies in a folder of its name."""
ENCODER = "encoder"
"""The program that makes what the main one's cross-attention reads."""
DECODER = "decoder"
"""Beginning of the names of decoders for shorter lengths of what is encoded, ``decoder_<length>``, each with its
``encoder_<length>``; the main program is the decoder of the longest."""

FORMAT_VERSION = 5
"""Version of the manifest and of the folder; a package of another version is refused."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file.

    Attributes:
        bytes: Size.
        sha256: Digest.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TableRecord:
    """What the manifest knows of a table that stays in the checkpoint.

    Attributes:
        shape: Sizes.
        sha256: Digest of its numbers as float32, so that it does not depend on how a checkpoint stores them.
    """

    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class ProgramRecord:
    """What the manifest knows of a program: one graph with its specializations.

    Attributes:
        model: Name of the module.
        report: What the passes did, see `qeff_ir.passing.manager.Report`.
    """

    model: str
    report: dict[str, Any]


@dataclass
class Manifest:
    """The facts about a package.

    Attributes:
        target: Name of the backend.
        key: Digest of all that can change the package.
        compiled: Whether the target's compiler ran; `False` after an emit only.
        options: The compile options as plain data.
        programs: The programs by name; `MAIN` is one of them.
        files: Every file of the package by path relative to it.
        tables: The parameters whose rows the host looks up in the checkpoint.
        version: Format version.
    """

    target: str
    key: str
    compiled: bool
    options: dict[str, Any]
    programs: dict[str, ProgramRecord]
    files: dict[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    tables: dict[str, TableRecord] = field(default_factory=dict[str, TableRecord])
    version: int = FORMAT_VERSION

    @property
    def model(self) -> str:
        """Name of the main program's module."""
        return self.programs[MAIN].model


_TYPES: Mapping[str, type] = {
    "target": str, "key": str, "compiled": bool, "options": dict, "programs": dict, "files": dict, "tables": dict,
    "version": int,
}  # fmt: skip


_RESERVED = frozenset({SIDE_FOLDER, WEIGHTS, MANIFEST})


def is_package(folder: Path) -> bool:
    """Whether a folder claims to be a package."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest without looking at the other files.

    Raises:
        PackageError: There is none, it is damaged, or it is of another version.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise PackageError(f"{folder} is not a qeff package (it has no {MANIFEST}): compile the model with -o {folder}")
    try:
        data: Any = read_json(path, error=PackageError)
    except PackageError as error:
        raise PackageError(f"{path} is damaged ({error.__cause__ or error}): compile the model again") from error
    try:
        if data["version"] != FORMAT_VERSION:
            raise PackageError(
                f"{folder} is a package of format version {data['version']}, this qeff-ir reads version "
                f"{FORMAT_VERSION}: compile the model again"
            )
        wrong = [name for name, kind in _TYPES.items() if type(data[name]) is not kind]
        files = {name: FileRecord(**record) for name, record in data.pop("files").items()}
        wrong += [n for n, r in files.items() if type(r.bytes) is not int or type(r.sha256) is not str]
        tables = {n: TableRecord(tuple(r["shape"]), r["sha256"]) for n, r in data.pop("tables").items()}
        records = sorted(data.pop("programs").items(), key=lambda item: item[0] != MAIN)
        programs = {n: ProgramRecord(**record) for n, record in records}
        wrong += [n for n, r in programs.items() if type(r.model) is not str or type(r.report) is not dict]
        if MAIN not in programs:
            raise ValueError(f"it lists no program '{MAIN}'")
        for name in programs:
            program_folder(folder, name)
        if wrong:
            raise TypeError(f"{wrong[0]} is of the wrong type")
        if not files:
            raise ValueError("it lists no files")
        return Manifest(programs=programs, files=files, tables=tables, **data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{path} is damaged ({error}): compile the model again") from error


def program_folder(folder: Path, program: str) -> Path:
    """Where the files of a program lie, as a target emits and opens them.

    Raises:
        PackageError: The name is not that of a folder of its own.
    """
    if program == MAIN:
        return folder
    plain_name(program, "the name of a program", PackageError)
    if program in _RESERVED:
        raise PackageError(f"a program cannot be called '{program}', as the package has it: choose another name")
    return folder / program


def encoder_of(program: str) -> str:
    """The program that makes what the cross-attention of another program reads, if there is one of this name."""
    return ENCODER if program == MAIN else ENCODER + program.removeprefix(DECODER)


def open_package(folder: Path) -> Manifest:
    """Read a package's manifest and check every file against it; before, put right what a killed build has left.

    Raises:
        PackageError: As `read_manifest`, or a file is missing or altered, or is not in the manifest.
    """
    replacement.put_right(folder)
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = _listed(folder, name)
        if path.stat().st_size != record.bytes or digest_file(path) != record.sha256:
            raise PackageError(
                f"{name} of the package {folder} was altered after it was compiled: compile the model again"
            )
    for name in _names(folder, PackageError):
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if name not in manifest.files and not hidden:
            raise PackageError(
                f"{ascii(name)[1:-1]} of the package {folder} is not in its manifest: remove it, or compile the model "
                "again"
            )
    return manifest


@contextlib.contextmanager
def opened(folder: Path, key: str | None = None) -> Generator[Manifest]:
    """Check a package, read it in the block, and make sure that it was not changed meanwhile.

    Whatever goes wrong in the block is the package's fault: what a library says of a damaged file becomes a sentence.

    Args:
        folder: The package.
        key: The key that it had when it was looked at last.

    Raises:
        PackageError: As `open_package`; or the package was replaced or changed, or cannot be read.
    """
    with readable(folder):
        manifest = open_package(folder)
        if key is not None and manifest.key != key:
            raise PackageError(f"{folder} was replaced by another package since it was opened: open it again")
        before = _stamps(folder, manifest)
        yield manifest
        if _stamps(folder, manifest) != before and open_package(folder).files != manifest.files:
            raise PackageError(f"{folder} was changed while it was read: open it again")


@contextlib.contextmanager
def readable(path: Path) -> Generator[None]:
    """The door behind which a package is read: no error of a library gets through.

    Raises:
        PackageError: In place of any error that is not a `QeffError`.
    """
    try:
        yield
    except QeffError:
        raise
    except Exception as error:  # ONNX, protobuf, NumPy and ONNX Runtime each raise what they like at damaged bytes
        said = (str(error).splitlines() or [""])[0][:200]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise PackageError(f"{path} cannot be read ({reason}): compile the model again") from error


def building(out: Path) -> AbstractContextManager[Path]:
    """A new folder that becomes the package `out`, see `qeff_ir.replacement.building`."""
    return replacement.building(out, is_package)


def seal(folder: Path, manifest: Manifest) -> None:
    """Record every file of a folder in the manifest and write it: the last step of a build.

    Args:
        folder: The folder.
        manifest: Its `files` are filled.
    """
    settle()
    manifest.files = {}
    for name in _names(folder):
        path = folder / name
        manifest.files[name] = FileRecord(path.stat().st_size, digest_file(path))
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, sort_keys=True))


def _listed(folder: Path, name: str) -> Path:
    """A file that the manifest names.

    Raises:
        PackageError: It is outside the package, is missing, or is no file.
    """
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        raise PackageError(f"{folder / MANIFEST} names {name!a}, a file outside the package: refused")
    try:
        missing = not os.path.lexists(folder / name)
    except (OSError, ValueError):  # a name that no file has
        missing = True
    if missing:
        raise PackageError(f"{name[:200]} of the package {folder} is missing: compile the model again")
    return regular_file(folder / name, folder, error=PackageError)


def _names(folder: Path, error: type[PackageError] | None = None) -> list[str]:
    """Every file below a folder but the manifest, sorted; see `files_below`."""
    return sorted({path.relative_to(folder).as_posix() for path in files_below(folder, error=error)} - {MANIFEST})


def _stamps(folder: Path, manifest: Manifest) -> list[object]:
    names = [MANIFEST, *manifest.files]
    try:
        return [(name, stamp(folder / name)) for name in names]
    except OSError:
        return [None]
