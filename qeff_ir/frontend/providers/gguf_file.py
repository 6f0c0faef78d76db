"""A GGUF file as a model: everything that a model folder has, as the installed transformers reads it in one file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from qeff_ir.errors import ModelLoadError, QeffError, UnsupportedModelError, first_line
from qeff_ir.frontend.checkpoint.config import check_sizes, make_config
from qeff_ir.frontend.checkpoint.folder_files import write_side_files
from qeff_ir.frontend.checkpoint.references import Checkpoint, mark
from qeff_ir.frontend.gguf.header import read_gguf
from qeff_ir.frontend.providers.stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.frontend.checkpoint.weights import Weights


class GgufFile(Stored):
    """A GGUF file; nothing beside it is read.

    Args:
        folder: Where it is.
        name: Its name there.

    Raises:
        ModelLoadError: There is no such file, it is damaged, or transformers cannot read it.
        UnsupportedModelError: It is a kind of model that is not supported.
    """

    def __init__(self, folder: Path, name: str) -> None:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelLoadError(f"gguf_file is {name!a:.200}, which is not inside of the model folder: refused")
        self.folder, path, self._loading = folder, folder / name, {"gguf_file": name}
        self._file = read_gguf(path, folder)
        where = {key: tensor.where for key, tensor in self._file.tensors.items()}
        self.checkpoint = Checkpoint(folder, where, {self._file.path: mark(self._file.path) or (0, 0, 0)})
        from qeff_ir.frontend.gguf.transformers_reading import fields_of

        try:
            self._fields = fields_of(self._file.path, self._file.architecture)
        except Exception as error:  # transformers raises whatever a file lacks
            raise UnsupportedModelError(
                f"transformers does not read the GGUF file {path} of the architecture '{self._file.architecture}' "
                f"({first_line(error)}): use the model's safetensors"
            ) from error
        sizes = [size for tensor in self._file.tensors.values() for size in tensor.shape]
        check_sizes(self._fields, folder, len(where), max(sizes, default=0))
        try:
            self.config = make_config(dict(self._fields), folder, trust_remote_code=False)
        except QeffError as error:
            raise ModelLoadError(f"the GGUF file {path} is not a model that transformers reads: {error}") from error
        if self.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"the GGUF file {path} is an encoder-decoder model, which is read from safetensors only"
            )

    @functools.cached_property
    def _side_files(self) -> dict[str, bytes]:
        """config.json and the tokenizer's files, by name."""
        from qeff_ir.frontend.gguf.tokenizer import side_files

        return side_files(self._file, self.config)

    def _weights(self, model: PreTrainedModel, *, partial: bool) -> Weights:
        from qeff_ir.frontend.gguf.weights import gguf_weights

        return gguf_weights(model, self._file, self.checkpoint, self._fields, partial=partial)

    def save_side_files(self, folder: Path) -> None:
        """See `Provider.save_side_files`.

        Raises:
            ModelLoadError: transformers makes no tokenizer of the file.
        """
        write_side_files(self._side_files, folder)
