"""What follows the transformer of a sentence model that is more than a pooling: linear layers, and their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.reading import regular_file

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer on an embedding.

    Attributes:
        folder: With its weights.
        features: Of what goes in, and of what comes out.
        bias: Whether something is added.
        activation: Name of a module of `torch.nn`.
        residual: Whether what goes in is added to what comes out.
    """

    folder: Path
    features: tuple[int, int]
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False

    def build(self) -> torch.nn.Module:
        """The layer with its weights.

        Raises:
            ModelLoadError: They are missing or of other shapes.
        """
        layer = _DenseLayer(self)
        weights = _weights(self.folder)
        wanted = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if found != wanted:
            raise ModelLoadError(
                f"the weights in {self.folder} are {found}, its config.json says {wanted}: download the model again"
            )
        layer.load_state_dict({name: value.float() for name, value in weights.items()})
        return layer


class _DenseLayer(torch.nn.Module):
    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(*dense.features, bias=dense.bias)
        self.activation: torch.nn.Module = getattr(torch.nn, dense.activation)()
        self.added = dense.residual
        if dense.residual and dense.features[0] != dense.features[1]:
            self.residual = torch.nn.Linear(*dense.features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.linear(x))
        if not self.added:
            return out
        return out + (self.residual(x) if hasattr(self, "residual") else x)


class SentenceHead(torch.nn.Module):
    """A pooling, then linear layers and scalings to unit length in any order.

    Args:
        pooling: As the pass `embedding` spells it, not ``none``, with the formulas of that pass; or a module or
            function of the user's.
        steps: What follows; `None` scales to unit length.
    """

    def __init__(self, pooling: str | Callable[..., Tensor], steps: Sequence[Dense | None]) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers = torch.nn.ModuleList([_Unit() if step is None else step.build() for step in steps])

    def forward(self, last_hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """One embedding of each row.

        Args:
            last_hidden_states: float ``[batch, tokens, features]``.
            attention_mask: 1 for tokens that count, int64 ``[batch, tokens]``.
        """
        if isinstance(self.pooling, str):
            mask = attention_mask.to(last_hidden_states.dtype)
            found = torch.cat([_pooled(mode, last_hidden_states, mask) for mode in self.pooling.split("+")], dim=-1)
        else:
            found = self.pooling(last_hidden_states, attention_mask)
        for layer in self.layers:
            found = layer(found)
        return found


class _Unit(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Scale to a largest entry of 1 first: squares of half precision numbers overflow at 256."""
        largest = x.abs().amax(-1, keepdim=True)
        scaled = x / torch.where(largest > 0, largest, 1.0)
        return scaled / (scaled * scaled).sum(-1, keepdim=True).clamp(min=1.0).sqrt()


def _pooled(mode: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """Every pooling but ``max`` is a sum with weights, which are 0 for padding."""
    if mode == "max":
        some = mask.amax(1, keepdim=True)
        return some * torch.where(mask[..., None] > 0, hidden, -65504.0).amax(1)
    place = torch.arange(1, mask.shape[1] + 1).to(mask.dtype)
    last = (mask * place).amax(1, keepdim=True)
    first = mask.shape[1] + 1 - (mask * (mask.shape[1] + 1 - place)).amax(1, keepdim=True)
    weights: dict[str, Callable[[], Tensor]] = {
        "mean": lambda: mask / mask.sum(1, keepdim=True).clamp(min=1.0),
        "mean-sqrt-len": lambda: mask / mask.sum(1, keepdim=True).clamp(min=1.0).sqrt(),
        "cls": lambda: mask * (place == first).to(mask.dtype),
        "last": lambda: mask * (place == last).to(mask.dtype),
        "weighted-mean": lambda: _shares(mask * (place - first + 1) / mask.shape[1], mask.shape[1]),
    }
    return (weights[mode]()[:, None, :] @ hidden)[:, 0]


def _shares(weights: Tensor, tokens: int) -> Tensor:
    return weights / weights.sum(1, keepdim=True).clamp(min=1.0 / tokens)


def activation(path: Any, where: Path) -> str:
    """The module of `torch.nn` that a dotted path names.

    Raises:
        UnsupportedModelError: It names something else.
    """
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    found = getattr(torch.nn, name, None)
    known = module == "torch.nn" or module.startswith("torch.nn.modules.")
    if not known or not isinstance(found, type) or not issubclass(found, torch.nn.Module):
        raise UnsupportedModelError(
            f"{where} has the activation_function {path!r}, which is not a module of torch.nn: pass pooling= with a "
            "torch module of your own that does the rest"
        )
    try:
        found()
    except TypeError as error:
        raise ModelLoadError(f"{where} has the activation_function {path!r}, which needs arguments: refused") from error
    return name


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a module's folder: safetensors, or else an older file of torch, of which only tensors are read."""
    from safetensors.torch import load_file

    safe = folder / "model.safetensors"
    try:
        if safe.exists():
            return load_file(regular_file(safe, folder))
        older = regular_file(folder / "pytorch_model.bin", folder)
        return dict(torch.load(older, weights_only=True, map_location="cpu"))
    except ModelLoadError:
        raise
    except Exception as error:  # both loaders raise types of their own
        raise ModelLoadError(
            f"the weights in {folder} cannot be read ({type(error).__name__}): restore them"
        ) from error
