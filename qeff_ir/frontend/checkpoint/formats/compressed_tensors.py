"""compressed-tensors: codes of 4 or 8 bits in words of 32, a scale for a group of inputs.

Format: https://github.com/vllm-project/compressed-tensors. Of a linear layer, ``weight_packed`` int32
``[out, in * bits / 32]`` has codes with an offset of half their range, the first in the lowest bits; ``weight_scale``
is ``[out, groups]``; ``weight_shape`` is ``[out, in]``; ``weight_zero_point`` int32 ``[out * bits / 32, groups]`` is
there where the grid is not symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.formats import Decoded, WeightFormat
from qeff_ir.quantized import Quantized, dequantized, lazy
from qeff_ir.ranges import FileRange

_CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


class CompressedTensors(WeightFormat):
    """``pack-quantized``, symmetric."""

    methods = ("compressed-tensors",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.where = where
        if settings.get("format") != "pack-quantized":
            raise UnsupportedModelError(f"{where}: the format {settings.get('format')!r:.60} is not read")
        groups = settings["config_groups"].values()
        self.bits = {int(group["weights"]["num_bits"]) for group in groups}

    def weights(self, entries: Mapping[str, FileRange]) -> Iterator[Decoded]:
        """See `WeightFormat.weights`."""
        for key in entries:
            if key.endswith(".weight_packed"):
                yield self._weight(key.removesuffix("_packed"), entries)

    def _weight(self, key: str, entries: Mapping[str, FileRange]) -> Decoded:
        names = (f"{key}_packed", f"{key}_scale", f"{key}_shape")
        missing = next((name for name in names if name not in entries), None)
        if missing is not None:
            raise ModelLoadError(f"the checkpoint of {self.where} lacks '{missing}': download the model again")
        packed, scale, shape = (entries[name] for name in names)
        rows, columns = (int(size) for size in shape.tensor(key).numpy())
        bits = packed.shape[1] * 32 // columns
        dtype = _CODES[bits]
        codes = FileRange(packed.file, packed.offset, packed.length, dtype, (rows, columns), packed.linkable)
        groups = scale.shape[1]
        half = np.full(scale.shape, 1 << (bits - 1), np.uint8)
        zeros = lazy(key, dtype, scale.shape, lambda: half)
        parts = Quantized(codes.tensor(key), scale.tensor(key), zeros, 1, -(-columns // groups))
        return Decoded(key, dequantized(key, parts), names)
