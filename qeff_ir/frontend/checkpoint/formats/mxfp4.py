"""MXFP4: experts of 4 bits, with an exponent for each 32 inputs.

Format: the OCP Microscaling specification, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf,
as gpt-oss lays it out. Of a weight ``[experts, in, out]``, a file has it turned around: ``…_blocks`` uint8
``[experts, out, in / 32, 16]``, E2M1 with the first number in the low half of a byte, and ``…_scales`` uint8
``[experts, out, in / 32]``, exponents with a bias of 127. Codes are turned back as they are written, an expert at a
time.

A product with a power of two is exact: the numbers are those of transformers to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.checkpoint.formats import Decoded, WeightFormat
from qeff_ir.quantized import Quantized, dequantized, lazy
from qeff_ir.ranges import FileRange

_BLOCK = 32
"""Inputs that share an exponent."""


class MXFP4(WeightFormat):
    """What was left alone (``modules_to_not_convert``) shows in the file."""

    methods = ("mxfp4",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.settings, self.where = settings, where

    def weights(self, entries: Mapping[str, FileRange]) -> Iterator[Decoded]:
        """See `WeightFormat.weights`."""
        for blocks in entries:
            if blocks.endswith("_blocks"):
                key = blocks.removesuffix("_blocks")
                yield Decoded(
                    key, self._weight(key, entries[blocks], entries.get(f"{key}_scales")), (blocks, f"{key}_scales")
                )

    def _weight(self, key: str, blocks: FileRange, scales: FileRange | None) -> ir.LazyTensor:
        told = "no scales" if scales is None else f"scales of {scales.dtype} {list(scales.shape)}"
        fits = scales is not None and {blocks.dtype, scales.dtype} == {ir.DataType.UINT8}
        if scales is None or not fits or blocks.shape != (*scales.shape, _BLOCK // 2) or len(blocks.shape) != 4:
            raise ModelLoadError(
                f"the checkpoint of {self.where} has the weight '{key}' in blocks of {blocks.dtype} "
                f"{list(blocks.shape)}, and {told}: download the model again"
            )
        experts, rows, groups, _ = blocks.shape
        stored, exponents, columns = blocks.tensor(key), scales.tensor(key), groups * _BLOCK
        packed = rows % 2 == 0

        def codes() -> Array:
            pairs = stored.numpy().reshape(experts, rows, columns // 2)
            turned = np.empty((experts, columns, rows // 2 if packed else rows), np.uint8)
            for expert in range(experts):
                numbers = np.stack((pairs[expert] & 15, pairs[expert] >> 4), axis=-1).reshape(rows, columns).T
                turned[expert] = numbers[:, 0::2] | numbers[:, 1::2] << 4 if packed else numbers
            return turned

        parts = Quantized(
            lazy(key, ir.DataType.FLOAT4E2M1, (experts, columns, rows), codes, packed=packed),
            lazy(key, ir.DataType.FLOAT8E8M0, (experts, groups, rows), lambda: exponents.numpy().swapaxes(1, 2)),
            None,
            1,
            _BLOCK,
        )
        return dequantized(key, parts)

    def reference(self, decoded: Mapping[str, Decoded], entries: Mapping[str, FileRange]) -> dict[str, Any] | None:
        """See `WeightFormat.reference`."""
        return {**self.settings, "dequantize": True}
