"""The inputs of a forward pass, told by its signature and its configuration, or by the user's example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.ir.residents import DimValue

BATCH, LENGTH = "batch_size", "seq_len"
"""Symbols of the two axes that a specialization sizes."""

Wanted = Sequence[str] | Mapping[str, Any]
"""What a user may say of the inputs: their names, or a tensor for each."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a forward pass.

    Attributes:
        name: As the forward pass has it.
        dtype: ``int64``, ``float32`` or ``bool``.
        shape: Symbols and sizes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[DimValue, ...]


def find_inputs(model: PreTrainedModel, wanted: Wanted | None = None) -> list[InputSpec]:
    """The inputs to lower a model with.

    Args:
        model: Its `main_input_name`, the signature of its forward pass and its configuration tell the default: the main
            input, and the attention mask of token ids.
        wanted: Names instead (each one of token ids, of their shape or with a shape that the configuration tells), or
            an example tensor for each. Axis 0 of an example is the batch; axis 1 of one of integers, and of one of
            floats with two axes, is the length.

    Raises:
        ModelLoadError: The forward pass does not take one of `wanted`.
        UnsupportedModelError: The configuration does not tell the shape of an input.
    """
    parameters = inspect.signature(model.forward).parameters
    if wanted is None:
        main = model.main_input_name
        wanted = [main]
        if main == "input_ids" and "attention_mask" in parameters:
            wanted = [main, "attention_mask"]
    for name in wanted:
        if name not in parameters:
            takes = ", ".join(n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD)
            raise ModelLoadError(f"{type(model).__name__} has no input '{name}': it takes {takes}")
    if isinstance(wanted, Mapping):
        return [_like(name, torch.as_tensor(value)) for name, value in wanted.items()]
    return [_told(model, name) for name in wanted]


def _like(name: str, example: torch.Tensor) -> InputSpec:
    """An input of an example's type and rank."""
    if example.dim() == 0:
        raise ModelLoadError(f"the example of '{name}' is a single number: give a tensor with a batch axis")
    shape: list[DimValue] = [BATCH, *example.shape[1:]]
    if example.dim() == 2 or (example.dim() > 2 and not example.is_floating_point()):
        shape[1] = LENGTH
    dtype = torch.float32 if example.is_floating_point() else example.dtype
    return InputSpec(name, dtype if dtype is torch.bool or dtype.is_floating_point else torch.int64, tuple(shape))


def _told(model: PreTrainedModel, name: str) -> InputSpec:
    """An input whose shape the configuration tells."""
    config: Any = model.config
    parts = [config, *(getattr(config, n) for n in ("vision_config", "audio_config") if hasattr(config, n))]

    def known(*names: str) -> Any:
        return next((v for c in parts for n in names if (v := getattr(c, n, None)) is not None), None)

    if name == "pixel_values":
        size, channels = known("image_size", "input_size"), known("num_channels") or 3
        if size is not None:
            height, width = size if isinstance(size, list | tuple) else (size, size)  # pyright: ignore[reportUnknownVariableType]
            return InputSpec(name, torch.float32, (BATCH, channels, height, width))
    elif name in ("input_features", "input_values"):
        bins, frames = known("num_mel_bins"), known("max_length")
        if bins is not None and name == "input_values" and frames is not None:
            return InputSpec(name, torch.float32, (BATCH, frames, bins))
        if bins is not None and known("max_source_positions") is not None:  # two frames for each position
            return InputSpec(name, torch.float32, (BATCH, bins, 2 * known("max_source_positions")))
        width = known("feature_projection_input_dim", "input_feat_per_channel")
        if width is not None:
            return InputSpec(name, torch.float32, (BATCH, LENGTH, width))
        if name == "input_values":
            return InputSpec(name, torch.float32, (BATCH, LENGTH))
    elif name == "inputs_embeds":
        embeddings = model.get_input_embeddings()
        return InputSpec(name, torch.float32, (BATCH, LENGTH, int(embeddings.embedding_dim)))  # pyright: ignore[reportArgumentType]
    elif name.endswith(("_ids", "_mask")):
        return InputSpec(name, torch.int64, (BATCH, LENGTH))
    raise UnsupportedModelError(
        f"the configuration of {type(model).__name__} does not tell the shape of its input '{name}': "
        "give example tensors as inputs={...}"
    )


def positions(model: PreTrainedModel) -> int | None:
    """Positions that a model's configuration speaks of; `None` where it does not."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None
