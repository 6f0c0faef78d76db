"""A model's modules once more, on the same tensors: what a trace changes is not somebody's model."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from qeff_ir.errors import UnsupportedModelError

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def structure(model: ModuleT) -> ModuleT:
    """A copy of a model's modules and configuration that holds the very tensors of the model.

    What a trace sets on modules (an attention function, fake weights, a shorter list of layers) is then not set on a
    model that another thread may be running.

    Raises:
        UnsupportedModelError: A module holds something that cannot be copied.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *held]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:  # whatever is not made to be copied raises
        raise UnsupportedModelError(
            f"{type(model).__name__} holds something that cannot be copied ({error}), and would be changed while it is "
            "traced: save the model, and compile it from its folder"
        ) from error
