"""What a model in files can say of itself, whatever their form: a skeleton without weights, and references to those."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from abc import abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qeff_ir.errors import ModelLoadError, QeffError, UnsupportedModelError, first_line
from qeff_ir.frontend.providers.provider import Provider
from qeff_ir.reading import files_below, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.frontend.checkpoint.references import Checkpoint
    from qeff_ir.frontend.checkpoint.weights import Weights


class Stored(Provider):
    """A model in files.

    Attributes:
        folder: Where they are.
        checkpoint: Where its tensors lie.
    """

    folder: Path
    checkpoint: Checkpoint
    _quantization: object = None
    """What the configuration says of quantized weights."""
    _loading: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """What transformers' ``from_pretrained`` needs beside the folder."""

    def part(self, config: PreTrainedConfig) -> Self:
        """See `Provider.part`; transformers' own conversions know the names of its tensors."""
        found = copy.copy(self)
        found.config = config
        return found

    def opened(self, auto: Any, *, partial: bool = False) -> tuple[PreTrainedModel, Weights]:
        """See `Provider.opened`; sizes are compared before anything large is made of them."""
        from qeff_ir.frontend.checkpoint.skeleton import compute_buffers

        self.checkpoint.check_unchanged()
        model = self._skeleton(auto)
        weights = self._weights(model, partial=partial)
        with self._buildable(auto):
            compute_buffers(model)
        return model, weights

    @abstractmethod
    def _weights(self, model: PreTrainedModel, *, partial: bool) -> Weights:
        """The tensors of a skeleton by the names of its parameters."""

    def _skeleton(self, auto: Any) -> PreTrainedModel:
        from qeff_ir.frontend.checkpoint.skeleton import empty_model

        with self._buildable(auto):
            return empty_model(
                self.config,
                trust_remote_code=self.trust_remote_code,
                auto=auto,
                tensors=len(self.checkpoint.entries),
            )

    @contextlib.contextmanager
    def _buildable(self, auto: Any) -> Generator[None]:
        """Turn what transformers raises while it makes a model of a configuration into one sentence."""
        try:
            yield
        except QeffError:
            raise
        except Exception as error:  # transformers raises whatever its many models raise
            from qeff_ir.frontend.private import loads

            kind = getattr(self.config, "model_type", "") or type(self.config).__name__
            if not self.remote and not loads(auto, self.config):
                raise UnsupportedModelError(
                    f"{self.folder} is a model of type {kind}, which {auto.__name__} does not load: open it with the "
                    "class for what it does"
                ) from error
            raise ModelLoadError(
                f"transformers cannot make the model of type {kind} that {self.folder / 'config.json'} asks for: "
                f"{first_line(error)}"
            ) from error

    def identity(self) -> dict[str, Any] | None:
        """The configuration, how and where the weights are, and the folder's code if it may run.

        What else is decided while weights are loaded, which of them are tied, say, follows from these and from the
        digests of `weight_files`.
        """
        if self.trust_remote_code and any("--" in reference for reference in self.remote):
            return None  # code of another repository, which is not in the folder
        code = files_below(self.folder, "*.py", error=ModelLoadError) if self.trust_remote_code else []
        files = {file: index for index, file in enumerate(self.checkpoint.files)}
        return {
            "config": self.config.to_dict(),
            "quantization": self._quantization,
            "code": {
                str(p.relative_to(self.folder)): hashlib.sha256(read_bytes(p, self.folder)).hexdigest() for p in code
            },
            "tensors": {k: [files[e.file], e.offset, e.length] for k, e in self.checkpoint.entries.items()},
        }

    def weight_files(self) -> list[Path]:
        """See `Provider.weight_files`.

        Raises:
            ModelLoadError: One was changed since the model was opened.
        """
        self.checkpoint.check_unchanged()
        return self.checkpoint.files

    def reference(self, auto: Any, dtype: str = "float32") -> PreTrainedModel:
        """See `Provider.reference`; quantized weights are dequantized by transformers, if it can, else here."""
        import torch

        from qeff_ir.frontend.private import float32_scales

        if self.decoded_here():
            return self._decoded_model(auto)
        config = copy.deepcopy(self.config)
        if self.checkpoint.reference is not None:
            config.quantization_config = copy.deepcopy(self.checkpoint.reference)
        with self._buildable(auto), float32_scales():
            model: PreTrainedModel = auto.from_pretrained(
                self.folder,
                config=config,
                dtype=getattr(torch, dtype),
                trust_remote_code=self.trust_remote_code,
                **self._loading,
            )
            return model.eval()

    def decoded_here(self) -> bool:
        """See `Provider.decoded_here`."""
        return bool(self.checkpoint.decoded) and self.checkpoint.reference is None

    def _decoded_model(self, auto: Any) -> PreTrainedModel:
        """The model with the numbers of quantized weights, in float32."""
        import numpy as np
        import torch

        weights = self.opened(auto)[1]
        with self._buildable(auto):
            model: PreTrainedModel = auto.from_config(
                copy.deepcopy(self.config), dtype=torch.float32, trust_remote_code=self.trust_remote_code
            )
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(torch.from_numpy(np.array(weights[name].numpy())))
        return model.eval()
