"""A transformers model in memory."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.providers.provider import Provider

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.frontend.checkpoint.processors import PartKind
    from qeff_ir.frontend.checkpoint.weights import Weights


class Memory(Provider):
    """A transformers model in memory, which stays as it is, in training mode, say; its class is its own.

    It has no identity: the model's code may have been changed in memory.

    Args:
        model: The model.
        processor: Its processor, or the part of it that makes the model's inputs; a model of texts needs none.

    Raises:
        ModelLoadError: It is no transformers model.
    """

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelLoadError(f"{type(model).__name__} is no transformers model: use from_pretrained() for a folder")
        self.model, self.config, self.processor = model, model.config, processor

    def part(self, config: PreTrainedConfig) -> Self:
        """See `Provider.part`; the whole model where none of its own is of such a configuration."""
        from transformers import PreTrainedModel

        own = (child for child in self.model.children() if isinstance(child, PreTrainedModel))
        found = copy.copy(self)
        found.model = next((child for child in own if type(child.config) is type(config)), self.model)
        found.config = found.model.config
        return found

    def opened(self, auto: Any, *, partial: bool = False) -> tuple[PreTrainedModel, Weights]:
        """See `Provider.opened`."""
        from qeff_ir.frontend.checkpoint.weights import memory_weights

        model = self._copy()
        return model, memory_weights(model)

    def _copy(self) -> PreTrainedModel:
        """The model that is lowered: see `qeff_ir.frontend.structure`."""
        from qeff_ir.frontend.structure import structure

        return structure(self.model)

    def reference(self, auto: Any, dtype: str = "float32") -> PreTrainedModel:
        """The model in evaluation mode: itself, or a copy with the same weights if it is in training."""
        if not any(module.training for module in self.model.modules()):
            return self.model
        shared = {id(t): t for t in itertools.chain(self.model.parameters(), self.model.buffers())}
        return copy.deepcopy(self.model, shared).eval()

    def processor_of(self, kind: PartKind) -> Any:
        """See `Provider.processor_of`.

        Raises:
            UnsupportedModelError: The processor has none for videos.
        """
        from qeff_ir.frontend.checkpoint.processors import part_of

        return part_of(kind, self.processor)

    def save_side_files(self, folder: Path) -> None:
        """Write configuration and generation defaults, as they are, and the processor, which has the tokenizer."""
        self.config.to_json_file(folder / "config.json")
        if self.model.can_generate():
            defaults = self.model.generation_config
            defaults.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
        if self.processor is not None:
            self.processor.save_pretrained(folder)
