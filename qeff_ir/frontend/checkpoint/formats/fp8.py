"""FP8: a weight of one byte a number, with a scale for each block of it.

Format: transformers' ``FineGrainedFP8Config``, https://huggingface.co/docs/transformers/quantization/finegrained_fp8.
Of a linear layer, ``weight`` is F8_E4M3 (or F8_E5M2) ``[out, in]``, and ``weight_scale_inv`` is what its numbers are
*multiplied* with: one, or ``[out / rows, in / columns]`` of blocks of ``weight_block_size``, as float32, bfloat16, or a
byte that is an exponent. Some files call it ``weight_scale``, ``scale`` or ``qscale_weight``. Experts may be one tensor
``[experts, out, in]`` with ``…_scale_inv``. A weight of int8 with scales has two numbers of 4 bits (E2M1) in a byte,
the first in its low half: ``[out, in / 2]``.

transformers multiplies in float32, so that the numbers here are its own to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import onnx_ir as ir

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.checkpoint.formats import Decoded, WeightFormat
from qeff_ir.frontend.checkpoint.formats.grid import even, gridded
from qeff_ir.quantized import dequantized
from qeff_ir.ranges import FileRange

_BYTES = frozenset({ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})
_PLAIN = "_scale"
"""Ending of the scale's name in files that transformers does not take for quantized."""


class FP8(WeightFormat):
    """Modules that were left alone (``modules_to_not_convert``) have no scales, and so show in the file."""

    methods = ("fp8",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.settings = settings
        block: object = settings.get("weight_block_size")
        if block is not None and not _sizes(block):
            raise ModelLoadError(f"{where}: weight_block_size is {block!r:.60}: give two positive numbers, or null")
        self.block = cast("list[int] | None", block)

    def weights(self, entries: Mapping[str, FileRange]) -> Iterator[Decoded]:
        """See `WeightFormat.weights`."""
        for key, entry in entries.items():
            scale = next((name for name in _scales(key) if name in entries), None)
            if entry.dtype in _BYTES and scale is None:
                raise ModelLoadError(
                    f"the checkpoint of {self.where} has the tensor '{key}' of one byte a number and no scale of it "
                    f"('{key}_scale_inv'): download the model again"
                )
            if scale is not None and (entry.dtype in _BYTES or entry.dtype == ir.DataType.INT8):
                yield self._weight(key, entry, scale, entries[scale])

    def _weight(self, key: str, codes: FileRange, scale: str, scales: FileRange) -> Decoded:
        if codes.dtype == ir.DataType.INT8 and codes.shape:
            shape = (*codes.shape[:-1], 2 * codes.shape[-1])
            codes = replace(codes, dtype=ir.DataType.FLOAT4E2M1, shape=shape)
        parts = gridded(key, codes, scales, self.block) if len(codes.shape) > 1 else None
        if parts is None:
            raise ModelLoadError(
                f"the checkpoint of {self.where} has '{scale}' of {scales.dtype} {list(scales.shape)}, which does not "
                f"fit '{key}' of {list(codes.shape)} in blocks of {self.block}: download the model again"
            )
        return Decoded(key, dequantized(key, parts), (key, scale))

    def reference(self, decoded: Mapping[str, Decoded], entries: Mapping[str, FileRange]) -> dict[str, Any] | None:
        """See `WeightFormat.reference`: transformers takes no other name, and all blocks for equally large."""
        for key, scale in (found.parts for found in decoded.values()):
            if scale == key + _PLAIN or not even(entries[key], entries[scale], self.block):
                return None
        return {**{name: value for name, value in self.settings.items() if value is not None}, "dequantize": True}


def _scales(key: str) -> Iterator[str]:
    yield f"{key}_scale_inv"
    yield f"{key}{_PLAIN}"
    module, _, last = key.rpartition(".")
    if last == "weight":
        yield f"{module}.scale"
        yield f"{module}.qscale_weight"


def _sizes(block: object) -> bool:
    sizes = cast("list[object]", block) if isinstance(block, list) else []
    return len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
