"""A base model inside of a PEFT model, lowered without PEFT."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import AdapterError
from qeff_ir.frontend.source import MemorySource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.frontend.weights import Weights
    from qeff_ir.module import Module


class AdaptedMemorySource(MemorySource):
    """The base model of a `peft.PeftModel`; its adapters are set aside while it is lowered.

    Args:
        model: The PEFT model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.get_base_model())

    def lower(self) -> Module:
        """See `Source.lower`.

        Raises:
            AdapterError: An adapter is merged into the weights.
        """
        with set_aside(self.model):
            return super().lower()

    def weights(self) -> Weights:
        """See `Source.weights`."""
        with set_aside(self.model):
            return super().weights()

    def reference(self) -> PreTrainedModel:
        """See `Source.reference`; its adapters are active unless they are disabled."""
        return super().reference()

    def save_side_files(self, folder: Path) -> None:
        """See `Source.save_side_files`."""
        with set_aside(self.model):
            super().save_side_files(folder)


@contextlib.contextmanager
def set_aside(model: PreTrainedModel) -> Generator[None]:
    """Put the base layers in the place of PEFT's, for as long as the block lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    replaced: list[tuple[Any, str, Any]] = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BaseTunerLayer):
                if child.merged:
                    raise AdapterError("an adapter is merged into the model's weights: call unmerge_adapter() first")
                replaced.append((parent, name, child))
    try:
        for parent, name, child in replaced:
            setattr(parent, name, child.get_base_layer())
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
