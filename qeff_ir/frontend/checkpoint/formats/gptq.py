"""GPTQ: codes of 2, 3, 4 or 8 bits with a scale and a zero for each group of inputs.

Format: GPTQModel 7.7.0, ``gptqmodel/nn_modules/qlinear`` (``pack_original``) and ``gptqmodel/utils/model.py``,
https://github.com/ModelCloud/GPTQModel. Of a linear layer, ``qweight`` int32 ``[in * bits / 32, out]`` has codes of
several inputs in a word, the first in the lowest bits; ``qzeros`` int32 ``[groups, out * bits / 32]`` has zeros of
several outputs; ``scales`` is ``[groups, out]``; ``g_idx`` int32 ``[in]`` is the group of each input. A number is
``(code - zero) * scale``. Format ``gptq`` stores zeros less one, taken from whole words, so that one is added to whole
words; ``gptq_v2`` stores them as they are. Of 3 bits, 32 codes fill three words; what GPTQModel adds to the zeros of
format ``gptq`` there is not one for each of them, so that writers differ, and the format is refused. Codes of 2 and 3
bits get 4, for which targets have kernels. Where inputs were sorted by their activations (``desc_act``), those of a
group are not neighbors: such a weight is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.formats import Decoded, WeightFormat
from qeff_ir.frontend.checkpoint.formats.words import (
    misfit,
    parts,
    streamed,
    transposed,
    transposed_scales,
    words,
)
from qeff_ir.quantized import Quantized, dequantized, lazy
from qeff_ir.ranges import FileRange

_CODES = {2: ir.DataType.UINT4, 3: ir.DataType.UINT4, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
"""What codes of so many bits become."""
_LESS = {"gptq": 1, "gptq_v2": 0}
"""What a format takes from a zero before it is stored."""
_ONES = {2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}
"""A word of ones; of 3 bits, nothing is added."""
_ROWS = 256
"""Outputs whose numbers are computed together."""


class Gptq(WeightFormat):
    """Formats ``gptq`` and ``gptq_v2``, of 2 to 8 bits, which may differ between layers (``dynamic``)."""

    methods = ("gptq",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.where = where
        name = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
        bits, self.group = settings.get("bits"), settings.get("group_size", 128)
        self.sorted = bool(settings.get("desc_act"))
        if name not in _LESS:
            raise UnsupportedModelError(
                f"{where}: GPTQ of format {name!r:.60} is not read, {' and '.join(_LESS)} are: save the model in "
                "one of them"
            )
        if bits not in _CODES or not isinstance(self.group, int) or (self.group < 1 and self.group != -1):
            raise UnsupportedModelError(
                f"{where}: GPTQ with bits={bits!r:.20} and group_size={self.group!r:.20} is not read: bits must be 2, "
                "3, 4 or 8, and group_size a number of inputs, or -1 for all"
            )
        self.less = _LESS[name]

    def weights(self, entries: Mapping[str, FileRange]) -> Iterator[Decoded]:
        """See `WeightFormat.weights`."""
        for key in entries:
            if key.endswith(".qweight"):
                yield self._weight(key.removesuffix(".qweight"), entries)

    def _weight(self, layer: str, entries: Mapping[str, FileRange]) -> Decoded:
        names = (f"{layer}.qweight", f"{layer}.qzeros", f"{layer}.scales")
        codes, zeros, scales = parts(entries, names, self.where)
        groups, outputs = scales.shape
        bits = zeros.shape[1] * 32 // outputs
        if bits not in _CODES:
            raise UnsupportedModelError(
                f"the layer '{layer}' of the checkpoint of {self.where} has codes of {bits} bits, which are not read: "
                "2, 3, 4 and 8 are"
            )
        if bits == 3 and self.less:
            raise UnsupportedModelError(
                f"the layer '{layer}' of the checkpoint of {self.where} has codes of 3 bits in format gptq, whose "
                "zeros writers do not agree about: save the model in format gptq_v2"
            )
        inputs = codes.shape[0] * 32 // bits
        if codes.shape[1] != outputs:
            raise misfit(names[0], codes, (codes.shape[0], outputs), self.where)
        if zeros.shape != (groups, -(-outputs * bits // 32)):
            raise misfit(names[1], zeros, (groups, -(-outputs * bits // 32)), self.where)
        index = self._groups(layer, entries, inputs, groups)
        block = inputs if index[-1] == index[0] else int(np.argmax(index != index[0]))
        dtype, taken = _CODES[bits], np.uint32(self.less * _ONES[bits])
        found = Quantized(
            lazy(names[0], dtype, (outputs, inputs), lambda: _codes(words(codes), bits), packed=True),
            transposed_scales(scales, names[2]),
            lazy(
                names[1],
                dtype,
                (outputs, groups),
                lambda: streamed(words(zeros) + taken, bits)[:, :outputs].T,
            ),
            1,
            block,
        )
        key = f"{layer}.weight"
        made = (
            dequantized(key, found) if np.array_equal(index, np.arange(inputs) // block) else _sorted(key, found, index)
        )
        return Decoded(key, made, (*names, f"{layer}.g_idx") if f"{layer}.g_idx" in entries else names)

    def _groups(self, layer: str, entries: Mapping[str, FileRange], inputs: int, groups: int) -> Array:
        """The group of each input, ``[in]``."""
        name = f"{layer}.g_idx"
        entry = entries.get(name)
        if entry is None and self.sorted:
            raise ModelLoadError(f"the checkpoint of {self.where} lacks '{name}': download the model again")
        if entry is None:
            index = np.arange(inputs) // (inputs if self.group == -1 else self.group)
        elif entry.shape != (inputs,) or entry.dtype != ir.DataType.INT32:
            raise misfit(name, entry, (inputs,), self.where)
        else:
            index = entry.tensor(name).numpy()
        if index.min() < 0 or index.max() != groups - 1:
            raise ModelLoadError(
                f"the layer '{layer}' of the checkpoint of {self.where} has {groups} groups, and its inputs belong to "
                f"groups {index.min()} to {index.max()}: it is of another model"
            )
        return index


def _codes(packed: Array, bits: int) -> Array:
    """Words ``[in * bits / 32, out]`` as bytes ``[out, …]`` of one code of 8 bits, or of two of fewer."""
    rows = transposed(packed)
    if bits in (4, 8):
        return rows.view(np.uint8)
    single = streamed(rows, bits)
    return single[:, ::2] | single[:, 1::2] << 4


def _sorted(key: str, found: Quantized, index: Array) -> ir.LazyTensor:
    """The weight whose groups are of inputs that are not neighbors, float32.

    Args:
        key: Of the weight.
        found: Its codes, and the scales and zeros of the groups.
        index: The group of each input, ``[in]``.
    """

    def numbers() -> Array:
        zeros = None if found.zeros is None else found.zeros.numpy().astype(np.float32)
        codes, scales = found.codes.numpy(), found.scales.numpy().astype(np.float32)
        made = np.empty(found.shape, np.float32)
        for start in range(0, len(made), _ROWS):
            rows = slice(start, start + _ROWS)
            made[rows] = codes[rows]
            if zeros is not None:
                made[rows] -= zeros[rows][:, index]
            made[rows] *= scales[rows][:, index]
        return made

    return lazy(key, ir.DataType.FLOAT, found.shape, numbers)
