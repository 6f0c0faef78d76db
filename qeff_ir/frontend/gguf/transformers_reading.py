"""How the installed transformers reads a GGUF file: all that it has no public name for, in one place.

``tests/frontend/test_private.py`` tells when one of these moves. transformers has two ways: architectures of its newer
one have a list of conversions like a checkpoint's, others a table of names and a function for the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from qeff_ir.arrays import Array
from qeff_ir.frontend.capture.own_thread import replaced


def fields_of(path: Path, architecture: str) -> dict[str, Any]:
    """What transformers makes of a file as the content of a config.json; raises whatever transformers raises."""
    if architecture in GGUF_CONFIG_ARCHS:
        return dict(get_gguf_config(*read_gguf_metadata(str(path))))
    return dict(load_gguf_checkpoint(str(path), return_tensors=False)["config"])


def conversions(architecture: str, model: PreTrainedModel) -> list[WeightTransform] | None:
    """The conversions of a file's tensors; `None` for an architecture of the older way."""
    if not is_gguf_arch_supported(architecture):
        return None
    return list(get_gguf_conversion_mapping(architecture, model.config))


class Made(NamedTuple):
    """What becomes of a tensor that is a parameter alone.

    Attributes:
        shape: Its sizes then.
        same: Whether its numbers stay as they are.
    """

    shape: tuple[int, ...]
    same: bool


class Processor:
    """The older way: a table of names, and a function that undoes what llama.cpp has done to the numbers.

    Args:
        architecture: Of the file.
        fields: See `fields_of`.
        model: A skeleton.
    """

    def __init__(self, architecture: str, fields: Mapping[str, Any], model: PreTrainedModel) -> None:
        self._processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(fields))
        # transformers makes the table of names anew for each module: a minute for thirty layers.
        with replaced(gguf, "get_tensor_name_map", functools.cache):
            self._names: dict[str, str] = get_gguf_hf_weights_map(model, self._processor)

    def __call__(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The parameters that tensors of the file become, by transformers' names."""
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        found: dict[str, Array] = {}
        for name, numbers in tensors.items():
            made: Any = self._processor.process(
                weights=numbers, name=name, tensor_key_mapping=self._names, parsed_parameters=parsed
            )
            if made.name in self._names:
                found[self._names[made.name]] = made.weights
        return found | {name: tensor.numpy() for name, tensor in parsed["tensors"].items()}

    def targets(self, name: str, shape: tuple[int, ...]) -> dict[str, Made | None]:
        """The parameters that a tensor becomes or is a part of.

        Of stacked experts (three sizes), which are copied on the way, one number stands for all: `None`.
        """
        whole = len(shape) < 3
        numbers = np.broadcast_to(np.float32(1), shape if whole else (1,) * len(shape))
        with np.errstate(all="ignore"):
            found = self({name: numbers})
        return {target: Made(made.shape, made is numbers) if whole else None for target, made in found.items()}

    def rows(self, name: str, target: str, shape: tuple[int, ...]) -> Array | None:
        """The order in which a parameter has the rows of a matrix of the file; `None` where more is done to it.

        The numbers of the rows, in one column, go the way of the matrix.
        """
        if len(shape) != 2:
            return None
        numbers = np.arange(shape[0], dtype=np.float64)[:, None]
        try:
            moved = self({name: numbers}).get(target)
        except ValueError:  # it looks at columns too
            return None
        if moved is None or moved.shape != numbers.shape or not np.array_equal(np.sort(moved, axis=0), numbers):
            return None
        return moved[:, 0].astype(np.int64)
