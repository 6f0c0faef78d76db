"""The forward pass as a function of its inputs, with its outputs as a flat tuple: what is traced, and what is tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from qeff_ir.frontend.structure import structure


class ForwardStep(torch.nn.Module):
    """The forward pass with its outputs as a flat tuple.

    Args:
        model: Whose forward pass.
        pooling: The user's own, if any: applied to the first output and the attention mask (ones where there is none);
            its result, ``output``, is then the only output.
        names: Takes the names of the outputs when it runs; outputs inside of outputs are joined by dots.
    """

    def __init__(self, model: PreTrainedModel, pooling: Callable[..., torch.Tensor] | None, names: list[str]) -> None:
        super().__init__()
        self.hf = model
        self.pooling = structure(pooling) if isinstance(pooling, torch.nn.Module) else pooling
        self._note = lambda found: names.__setitem__(slice(None), found)  # tracing takes back what is set on a module
        taken = inspect.signature(model.forward).parameters
        self.settings = {"use_cache": False} if "use_cache" in taken or hasattr(model.config, "use_cache") else {}
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            self.settings = {k: v for k, v in self.settings.items() if k in taken}

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run on inputs by name."""
        outputs = dict(_flat(self.hf(**inputs, **self.settings, return_dict=True)))
        if self.pooling is not None:
            hidden = next(iter(outputs.values()))
            mask = inputs.get("attention_mask")
            if mask is None:
                mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
            outputs = {"output": self.pooling(hidden, mask)}
        self._note(list(outputs))
        return tuple(outputs.values())


def _flat(output: Any, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [(prefix or "output", output)]
    items: list[tuple[str, Any]] = []
    if isinstance(output, Mapping):
        items = [(str(k), v) for k, v in output.items()]  # pyright: ignore[reportUnknownVariableType]
    elif isinstance(output, list | tuple):
        items = [(str(i), v) for i, v in enumerate(output)]  # pyright: ignore[reportUnknownVariableType]
    return [found for name, value in items for found in _flat(value, f"{prefix}.{name}" if prefix else name)]
