"""A model folder, as transformers saves it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.folder_files import read_side_files, write_side_files
from qeff_ir.frontend.providers.stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.frontend.checkpoint.processors import PartKind
    from qeff_ir.frontend.checkpoint.references import Checkpoint
    from qeff_ir.frontend.checkpoint.weights import Weights


class Folder(Stored):
    """A folder with ``config.json`` and safetensors.

    Its configuration and tokenizer files are read once, here: what is compiled later belongs together.

    Args:
        folder: The folder.
        trust_remote_code: Whether code of the folder may run; never unless the user says so.

    Raises:
        ModelLoadError: The folder is no model.
        UnsupportedModelError: Something in it that transformers acts on is not supported: quantized weights, say.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        from qeff_ir.frontend.checkpoint.config import (
            CONFIG,
            QUANTIZATION,
            check_sizes,
            make_config,
            read_fields,
            remote_code,
        )

        self.folder, self.trust_remote_code = folder, trust_remote_code
        _refuse_what_is_not_applied(folder, trust_remote_code)
        with _readable(folder):
            self._side_files = read_side_files(folder)
        fields = read_fields(folder, trust_remote_code, self._side_files.get(CONFIG))
        self._named_weights = fields.get("transformers_weights")
        self.remote = remote_code(fields)
        self._quantization = fields.get(QUANTIZATION)
        self.checkpoint = self._open()
        sizes = [size for entry in self.checkpoint.entries.values() for size in entry.shape]
        check_sizes(fields, folder, len(self.checkpoint.entries), max(sizes, default=0))
        self.config = make_config(fields, folder, trust_remote_code)
        if extra := type(self.config).extra_files:
            self.checkpoint = self._open(extra)

    def _open(self, extra: Iterable[str] = ()) -> Checkpoint:
        """The checkpoint, with the weights that its format makes of several tensors."""
        from qeff_ir.frontend.checkpoint.config import CONFIG
        from qeff_ir.frontend.checkpoint.formats import weight_format
        from qeff_ir.frontend.checkpoint.references import open_checkpoint

        with _readable(self.folder):
            found = open_checkpoint(self.folder, self._named_weights, extra)
            if self._quantization is None:
                return found
            return found.decode(weight_format(self._quantization, str(self.folder / CONFIG)))

    def _weights(self, model: PreTrainedModel, *, partial: bool) -> Weights:
        from qeff_ir.frontend.checkpoint.weights import checkpoint_weights

        return checkpoint_weights(model, self.checkpoint, partial=partial)

    def _skeleton(self, auto: Any) -> PreTrainedModel:
        from qeff_ir.frontend.checkpoint.references import SINGLE

        model = super()._skeleton(auto)
        if self._named_weights is not None and type(model.config) is not type(self.config):
            raise UnsupportedModelError(
                f"{self.folder / 'config.json'} names the weights of a model of several parts (transformers_weights), "
                f"of which only one is taken: name the file {SINGLE}, and take the field out"
            )
        return model

    def processor_of(self, kind: PartKind) -> Any:
        """See `Provider.processor_of`.

        Raises:
            ModelLoadError: There is none that can be read.
        """
        from qeff_ir.frontend.checkpoint.processors import read_part

        return read_part(kind, self.folder, trust_remote_code=self.trust_remote_code)

    def save_side_files(self, folder: Path) -> None:
        """Write the files as they were when the folder was opened; code is not written."""
        write_side_files(self._side_files, folder)


def _refuse_what_is_not_applied(folder: Path, trust_remote_code: bool) -> None:
    """Files that transformers acts on, and that change the answers."""
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} holds an adapter beside the model (adapter_config.json), which transformers would apply: move "
            "it to a folder of its own and open that with QEffAutoPeftModelForCausalLM and base_model=, or remove it"
        )
    if trust_remote_code and (folder / "custom_generate" / "generate.py").is_file():
        raise UnsupportedModelError(
            f"{folder} replaces transformers' generate (custom_generate/generate.py), which is not supported: remove "
            "it, or leave trust_remote_code out"
        )


@contextlib.contextmanager
def _readable(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ModelLoadError(f"{folder} cannot be read ({error.strerror or error}): check its permissions") from error
