"""The tokenizer of a GGUF file, as the files that a model folder has."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import ModelLoadError, first_line, is_panic
from qeff_ir.frontend.checkpoint.config import CONFIG
from qeff_ir.frontend.checkpoint.folder_files import read_side_files
from qeff_ir.frontend.gguf.header import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NAME = "model.gguf"


def side_files(file: GgufFile, config: PreTrainedConfig) -> dict[str, bytes]:
    """config.json, and the tokenizer with its chat template where the file has one; files beside it are not read.

    Raises:
        ModelLoadError: transformers makes no tokenizer of the file.
    """
    from transformers import AutoTokenizer

    own = {CONFIG: config.to_json_string().encode()}
    if not file.has_tokenizer:
        return own
    loader: Any = AutoTokenizer
    with tempfile.TemporaryDirectory(prefix="qeff-gguf-") as place, tempfile.TemporaryDirectory() as saved:
        (Path(place) / _NAME).symlink_to(file.path)
        try:
            loader.from_pretrained(place, gguf_file=_NAME, local_files_only=True).save_pretrained(saved)
        except BaseException as error:  # transformers raises anything, and the tokenizers' Rust panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise ModelLoadError(
                f"transformers makes no tokenizer of {file.path} ({first_line(error)}): convert the model again"
            ) from error
        return {**read_side_files(Path(saved)), **own}
