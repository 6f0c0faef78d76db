"""The numbers of a tensor of a GGUF file, read one tensor at a time."""

from __future__ import annotations

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.gguf.header import PLAIN, GgufTensor


def numbers(tensor: GgufTensor) -> Array:
    """All numbers of a tensor, of its shape: float32 of blocks, else of the type that they are stored in.

    Raises:
        PackageError: The file is gone or shorter.
    """
    stored = tensor.where.tensor("").numpy()
    if tensor.kind in PLAIN:
        return stored
    return _dequantized(stored, tensor.kind).reshape(tensor.shape)


def check_kind(name: str, tensor: GgufTensor) -> None:
    """Say that nothing here knows the blocks of a tensor.

    Raises:
        UnsupportedModelError: It is so.
    """
    if tensor.kind in PLAIN:
        return
    try:
        with np.errstate(all="ignore"):
            _dequantized(np.zeros((1, tensor.where.shape[-1]), np.uint8), tensor.kind)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"the tensor '{name}' of {tensor.where.file} is of type {tensor.kind}, which the installed package gguf "
            "does not turn into numbers: convert the model to Q8_0 or Q4_K"
        ) from error


def _dequantized(stored: Array, kind: str) -> Array:
    from gguf import GGMLQuantizationType, dequantize

    return np.asarray(dequantize(stored, GGMLQuantizationType[kind]), np.float32)
