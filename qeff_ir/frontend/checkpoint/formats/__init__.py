"""Formats of quantized checkpoints, one a file.

A format says which tensors of a checkpoint make one weight, and what its codes, scales and zeros are
(`qeff_ir.quantized`). The weight then stands under the key that it would have in a checkpoint that is not quantized,
and is renamed, stacked and split like any other (`qeff_ir.frontend.checkpoint.weights`). Weights alone are quantized:
scales of activations and of caches are left out, with a warning, and what they are for is computed in float32, as by
transformers when it dequantizes a checkpoint.

To add one: a module of this folder with a subclass of `WeightFormat` that names its ``quant_method``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.ranges import FileRange

_OF_RUNS = re.compile(
    r"[._](input|output|activation|k|v|q|kv)_(scale|zero_point|global_scale|g_idx)$|\.(k|v|q|kv)_cache\.\w+$"
)
"""Ends of the names of tensors that belong to numbers of a run: to activations, or to what a cache keeps."""


@dataclass(frozen=True)
class Decoded:
    """A weight that several tensors of a checkpoint make.

    Attributes:
        key: Of the weight in a checkpoint that is not quantized.
        tensor: Its float32 numbers, which nobody has read yet; of few bits it is one of `qeff_ir.quantized`.
        parts: The keys of the tensors that it is made of.
    """

    key: str
    tensor: ir.LazyTensor
    parts: tuple[str, ...]


class WeightFormat(ABC):
    """How the weights of a checkpoint are quantized.

    Args:
        settings: ``quantization_config`` of config.json.
        where: The file that says it, for messages.

    Raises:
        UnsupportedModelError: They ask for what is not read.
    """

    methods: ClassVar[tuple[str, ...]]
    """Its ``quant_method``s."""

    @abstractmethod
    def __init__(self, settings: Mapping[str, Any], where: str) -> None: ...

    @abstractmethod
    def weights(self, entries: Mapping[str, FileRange]) -> Iterator[Decoded]:
        """The weights that are quantized.

        Args:
            entries: All tensors of the checkpoint. What is part of no weight is taken as it is.

        Raises:
            ModelLoadError: The tensors of a weight do not fit each other.
        """

    def left_out(self, key: str) -> bool:
        """Whether a tensor, which is part of no weight, is of activations or of a cache."""
        return _OF_RUNS.search(key) is not None

    def reference(self, decoded: Mapping[str, Decoded], entries: Mapping[str, FileRange]) -> dict[str, Any] | None:
        """``quantization_config`` with which transformers itself loads the checkpoint here, as plain numbers.

        `None` where it does not: the numbers of `weights` are all that there is to compare with.

        Args:
            decoded: What `weights` made, by the key of the weight.
            entries: See `weights`.
        """
        return None


@functools.cache
def formats() -> dict[str, type[WeightFormat]]:
    """The formats by ``quant_method``."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {method: found for found in WeightFormat.__subclasses__() for method in found.methods}


def weight_format(settings: object, where: str) -> WeightFormat:
    """The format that config.json names.

    Args:
        settings: ``quantization_config``.
        where: The file.

    Raises:
        UnsupportedModelError: There is none, or it does not read the checkpoint.
    """
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    found = formats().get(method) if isinstance(method, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"{where} says that the weights are quantized by {str(method)!r:.60} (quantization_config), which is not "  # pyright: ignore[reportUnknownArgumentType]
            f"read: {', '.join(sorted(formats()))} are; use the unquantized checkpoint, and let the target compress"
        )
    return found(settings, where)  # pyright: ignore[reportArgumentType, reportUnknownArgumentType]
