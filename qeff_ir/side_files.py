"""What a package brings along of its model: configuration, generation defaults, tokenizer; one door to all of it.

The files come from whoever made the package. transformers reads them, but nothing that they name is run, nobody is
asked whether it may, and whatever transformers raises over them becomes one sentence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import PackageError, QeffError, is_panic
from qeff_ir.reading import MAX_SIDE_FILE_BYTES, read_json, regular_file

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_CONFIG = "config.json"
_GENERATION = "generation_config.json"


def read_model_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration.

    Args:
        folder: With the side files.

    Raises:
        PackageError: It is missing, damaged, or of a class that only the model's own code has.
    """
    path = folder / _CONFIG
    data = read_json(path, error=PackageError)
    if not isinstance(data, dict):
        raise PackageError(f"{path} is not a JSON object: compile the model again")
    from transformers import AutoConfig

    loader: Any = AutoConfig  # typed in parts only
    with _one_sentence(f"{path} is not a configuration that transformers reads"):
        return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_generation_config(folder: Path) -> GenerationConfig:
    """The model's defaults of ``generate``: those of ``generation_config.json``, else those in ``config.json``.

    Raises:
        PackageError: The file is damaged, or holds what transformers does not take.
    """
    from transformers import GenerationConfig

    own = (folder / _GENERATION).exists()
    path = folder / (_GENERATION if own else _CONFIG)
    if not isinstance(read_json(path, error=PackageError), dict):
        raise PackageError(f"{path} is not a JSON object: compile the model again")
    loader: Any = GenerationConfig
    # As transformers does it: the model's configuration does not keep what it says about generation, its file does.
    more = {} if own else {"config_file_name": _CONFIG, "_from_model_config": True}
    with _one_sentence(f"{path} holds generation defaults that transformers does not take"):
        return loader.from_pretrained(folder, local_files_only=True, **more)


def read_tokenizer(folder: Path, error: type[QeffError] = PackageError) -> PreTrainedTokenizerBase:
    """The tokenizer.

    Args:
        folder: With the side files; or a model folder.
        error: The type to raise.

    Raises:
        QeffError: There is none, it is damaged, or it is of a class that only the model's own code has.
    """
    if not folder.is_dir():
        raise error(f"{folder} has no tokenizer that can be read: there is no such folder")
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            regular_file(path, folder, limit=MAX_SIDE_FILE_BYTES if _is_side_file(path) else None, error=error)
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    with _one_sentence(f"{folder} has no tokenizer that can be read", error):
        return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_processor(folder: Path, error: type[QeffError] = PackageError) -> Any:
    """The processor of pictures and text; arguments and errors are those of `read_tokenizer`."""
    read_tokenizer(folder, error)  # which looks at each file first
    from transformers import AutoProcessor

    loader: Any = AutoProcessor
    with _one_sentence(f"{folder} has no processor that can be read", error):
        return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _is_side_file(path: Path) -> bool:
    return path.suffix in (".json", ".txt", ".jinja", ".model", ".tiktoken") and "safetensors" not in path.name


@contextlib.contextmanager
def _one_sentence(what: str, error: type[QeffError] = PackageError) -> Generator[None]:
    try:
        yield
    except BaseException as cause:  # transformers raises anything, and the tokenizers' Rust panics
        if not isinstance(cause, Exception) and not is_panic(cause):
            raise
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise error(f"{what} ({reason}): save the model with its own files, and compile it again") from cause
