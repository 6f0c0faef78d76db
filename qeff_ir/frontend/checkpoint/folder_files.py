"""The configuration and tokenizer files of a model folder, read once: a package gets those that its graph is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qeff_ir.errors import ModelLoadError
from qeff_ir.reading import MAX_SIDE_FILE_BYTES, list_folder, read_bytes, regular_file

PATTERNS = (
    "*.json",
    "*.txt",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "bpe.codes",
)
"""Everything of a model folder that is neither weights nor code."""

MAX_TOTAL_BYTES = 512 << 20
"""Limit of all of them together; they are held in memory."""


def read_side_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder by path below it, indexes of checkpoints left out.

    Raises:
        ModelLoadError: One is not a regular file inside the folder, or they are too large.
    """
    paths = sorted(path for pattern in PATTERNS for path in _matching(folder, pattern))
    paths = [path for path in paths if not path.name.endswith(".index.json")]
    total = sum(regular_file(path, folder, limit=MAX_SIDE_FILE_BYTES).stat().st_size for path in paths)
    if total > MAX_TOTAL_BYTES:
        raise ModelLoadError(
            f"the configuration and tokenizer files of {folder} have {total:,} bytes, at most {MAX_TOTAL_BYTES:,} are "
            "read: move what is not the model's elsewhere"
        )
    return {path.relative_to(folder).as_posix(): read_bytes(path, folder) for path in paths}


def _matching(folder: Path, pattern: str) -> list[Path]:
    below, _, name = pattern.rpartition("/")
    return list_folder(folder / below, name, error=ModelLoadError) if (folder / below).is_dir() else []


def write_side_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Put files that `read_side_files` read into another folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
