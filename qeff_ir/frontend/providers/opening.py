"""Which provider a name stands for: a folder, a hub id, or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qeff_ir.errors import ModelLoadError, first_line
from qeff_ir.frontend.checkpoint.folder_files import PATTERNS
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.providers.stored import Stored

_PATTERNS = (*PATTERNS, "*.safetensors", "*.py", "*_Dense/*.bin")


def open_provider(
    name_or_folder: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> Stored:
    """Open a folder, a hub id, or a GGUF file, by its own path or by its name in a folder or on the hub.

    Arguments and errors are those of `find_folder`, `Folder` and `qeff_ir.frontend.providers.gguf_file.GgufFile`.
    """
    if gguf_file is None and _is_gguf(name_or_folder):
        folder, gguf_file = Path(name_or_folder).parent, Path(name_or_folder).name
    else:
        folder = find_folder(name_or_folder, gguf_file, **hub)
    if gguf_file is None:
        return Folder(folder, trust_remote_code=trust_remote_code)
    from qeff_ir.frontend.providers.gguf_file import GgufFile

    return GgufFile(folder, gguf_file)


def _is_gguf(name: str | Path) -> bool:
    try:
        return str(name).endswith(".gguf") and Path(name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def find_folder(name_or_folder: str | Path, gguf_file: str | None = None, **hub: Any) -> Path:
    """A local folder, or the snapshot of a hub id (downloaded once; only the cache is used when offline).

    Args:
        name_or_folder: The folder or hub id.
        gguf_file: Of the hub, this file alone.
        hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` of `huggingface_hub.snapshot_download`.

    Raises:
        ModelLoadError: There is no such model.
    """
    if not isinstance(name_or_folder, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelLoadError(f"{name_or_folder!r:.100} is not a model folder: give a folder or a hub id")
    folder, name = Path(name_or_folder), str(name_or_folder)
    try:
        if folder.is_dir():
            return folder
        local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    except (OSError, ValueError):  # a name that no file can have
        local = True
    if local:
        raise ModelLoadError(f"{name!a:.200} is not a model folder: give a folder with config.json, or a hub id")
    return _snapshot(name, [gguf_file] if gguf_file is not None else _PATTERNS, hub)


def _snapshot(name: str, patterns: Sequence[str], hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **hub))
    except Exception as error:  # the hub client and its transport raise many unrelated types
        raise ModelLoadError(
            f"'{name}' is neither a local folder nor a model that the hub or its cache has ({first_line(error)})"
        ) from error
