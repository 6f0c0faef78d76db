"""A base model inside of a PEFT model, lowered without PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qeff_ir.errors import AdapterError
from qeff_ir.frontend.providers.memory import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PeftMemory(Memory):
    """The base model of a `peft.PeftModel`; its adapters are set aside while it is lowered.

    In the reference, they are active unless they are disabled.

    Args:
        model: The PEFT model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.get_base_model())

    def _copy(self) -> PreTrainedModel:
        """See `Memory._copy`; with the base layers in the place of PEFT's.

        Raises:
            AdapterError: An adapter is merged into the weights.
        """
        model = super()._copy()
        set_aside(model)
        return model


def set_aside(model: PreTrainedModel) -> None:
    """Put the base layers in the place of PEFT's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BaseTunerLayer):
                if child.merged:
                    raise AdapterError("an adapter is merged into the model's weights: call unmerge_adapter() first")
                setattr(parent, name, child.get_base_layer())
