"""The numbers of a tensor of a GGUF file, and the codes and scales of its blocks, read one tensor at a time.

A type whose blocks have no offset of their own is written as codes and scales without changing a number. The package
``gguf`` gives both: a block whose scales are replaced by 1 holds nothing but its codes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.gguf.header import PLAIN, GgufTensor
from qeff_ir.quantized import Quantized, lazy

_BLOCKS = {"Q4_0": 32, "Q5_0": 32, "Q8_0": 32, "Q6_K": 16}
"""Types without offsets: how many numbers share a scale."""
_SUPER, _SCALES = slice(208, 210), slice(192, 208)
"""Where a block of Q6_K has its half-precision scale, and the bytes by which it is multiplied for each 16 numbers."""


def numbers(tensor: GgufTensor) -> Array:
    """All numbers of a tensor, of its shape: float32 of blocks, else of the type that they are stored in.

    Raises:
        PackageError: The file is gone or shorter.
    """
    stored = tensor.where.tensor("").numpy()
    if tensor.kind in PLAIN:
        return stored
    return _dequantized(stored, tensor.kind).reshape(tensor.shape)


def parts(tensor: GgufTensor, rows: Array | None = None) -> Quantized | None:
    """The codes and scales of a matrix; `None` for one that has offsets too, or is not in blocks.

    Args:
        tensor: The matrix.
        rows: The order of its rows, if it is another one.
    """
    block = _BLOCKS.get(tensor.kind)
    if block is None or len(tensor.shape) != 2:
        return None
    kind, order = tensor.kind, slice(None) if rows is None else rows
    count = (tensor.shape[0], tensor.shape[1] // block)
    four = kind == "Q4_0"
    half = 8 if four else 0
    dtype = ir.DataType.UINT4 if four else ir.DataType.INT8
    scales = ir.DataType.FLOAT if kind == "Q6_K" else ir.DataType.FLOAT16

    def codes() -> Array:
        return (_codes(tensor)[order] + half).astype(np.uint8 if four else np.int8)

    zeros = lazy("", dtype, count, lambda: np.full(count, half, np.uint8)) if four else None
    made = lazy("", scales, count, lambda: _scales(tensor)[order])
    return Quantized(lazy("", dtype, tensor.shape, codes), made, zeros, 1, block)


def _codes(tensor: GgufTensor) -> Array:
    """The codes, float32 whole numbers around 0, of the tensor's shape."""
    blocks = _blocks(tensor)
    one = np.array([1], np.float16).view(np.uint8)
    if tensor.kind == "Q6_K":
        blocks[..., _SUPER], blocks[..., _SCALES] = one, 1
    else:
        blocks[..., :2] = one
    return _dequantized(blocks.reshape(tensor.where.shape), tensor.kind).reshape(tensor.shape)


def _scales(tensor: GgufTensor) -> Array:
    """The scales, ``[rows, blocks]``: as they are stored, or for Q6_K as float32."""
    blocks = _blocks(tensor)
    if tensor.kind != "Q6_K":
        return np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    wide = np.ascontiguousarray(blocks[..., _SUPER]).view(np.float16).astype(np.float32)
    return (wide * np.ascontiguousarray(blocks[..., _SCALES]).view(np.int8)).reshape(tensor.shape[0], -1)


def _blocks(tensor: GgufTensor) -> Array:
    """A copy of the bytes, ``[rows, blocks, bytes of a block]``."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]][1]
    return np.array(tensor.where.tensor("").numpy()).reshape(tensor.shape[0], -1, size)


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
