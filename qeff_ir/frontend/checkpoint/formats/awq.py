"""AWQ: codes of 4 bits with a scale and a zero for each group of inputs.

Format: AutoAWQ 0.2.9, ``awq/modules/linear``, https://github.com/casper-hansen/AutoAWQ, and the same classes of
GPTQModel 7.7.0. Of a linear layer, version ``gemm`` has ``qweight`` int32 ``[in, out / 8]`` and ``qzeros`` int32
``[groups, out / 8]``, whose words hold outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight, the first in the lowest bits, and
``scales`` ``[groups, out]``. Version ``gemv`` has ``qweight`` int32 ``[out, in / 8]``, ``qzeros`` int32
``[out, groups / 8]`` and ``scales`` ``[out, groups]`` in their natural order, groups filled up to more than there are.
A number is ``(code - zero) * scale``; ``zero_point`` says how the zeros were chosen, and they are stored either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.formats import Decoded, WeightFormat
from qeff_ir.frontend.checkpoint.formats.words import misfit, paired, parts, spread, transposed_scales, words
from qeff_ir.quantized import Quantized, dequantized, lazy
from qeff_ir.ranges import FileRange

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs in a word of version ``gemm``."""


class Awq(WeightFormat):
    """Versions ``gemm`` and ``gemv``, of 4 bits."""

    methods = ("awq",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        bits, self.group = settings.get("bits", 4), settings.get("group_size", 128)
        if self.version not in ("gemm", "gemv") or settings.get("backend") == "llm-awq":
            raise UnsupportedModelError(
                f"{where}: AWQ of version {self.version!r:.60} is not read, gemm and gemv are: pack the model "
                "in version gemm"
            )
        if bits != 4 or not isinstance(self.group, int) or (self.group < 1 and self.group != -1):
            raise UnsupportedModelError(
                f"{where}: AWQ with bits={bits!r:.20} and group_size={self.group!r:.20} is not read: bits must be 4, "
                "and group_size a number of inputs, or -1 for all"
            )

    def weights(self, entries: Mapping[str, FileRange]) -> Iterator[Decoded]:
        """See `WeightFormat.weights`."""
        for key in entries:
            if key.endswith(".qweight"):
                yield self._weight(key.removesuffix(".qweight"), entries)

    def _weight(self, layer: str, entries: Mapping[str, FileRange]) -> Decoded:
        names = (f"{layer}.qweight", f"{layer}.qzeros", f"{layer}.scales")
        codes, zeros, scales = parts(entries, names, self.where)
        inputs = codes.shape[0] if self.version == "gemm" else codes.shape[1] * 8
        group = inputs if self.group == -1 else self.group
        if inputs % group or inputs % 8:
            raise ModelLoadError(
                f"the tensor '{names[0]}' of the checkpoint of {self.where} has {inputs} inputs: groups of {group}, "
                "and words of 8, do not divide them: it is of another model"
            )
        made = self._gemm if self.version == "gemm" else self._gemv
        key = f"{layer}.weight"
        return Decoded(key, dequantized(key, made(names, codes, zeros, scales, group)), names)

    def _gemm(
        self, names: tuple[str, ...], codes: FileRange, zeros: FileRange, scales: FileRange, group: int
    ) -> Quantized:
        inputs, outputs = codes.shape[0], codes.shape[1] * 8
        groups = inputs // group
        for name, entry, shape in zip(
            names[1:], (zeros, scales), ((groups, outputs // 8), (groups, outputs)), strict=True
        ):
            if entry.shape != shape:
                raise misfit(name, entry, shape, self.where)
        return Quantized(
            lazy(names[0], ir.DataType.UINT4, (outputs, inputs), lambda: paired(words(codes), _ORDER), packed=True),
            transposed_scales(scales, names[2]),
            lazy(names[1], ir.DataType.UINT4, (outputs, groups), lambda: spread(words(zeros), _ORDER, 4)),
            1,
            group,
        )

    def _gemv(
        self, names: tuple[str, ...], codes: FileRange, zeros: FileRange, scales: FileRange, group: int
    ) -> Quantized:
        outputs, inputs = codes.shape[0], codes.shape[1] * 8
        groups = inputs // group
        for name, entry, each in zip(names[1:], (zeros, scales), (8, 1), strict=True):
            if entry.shape[0] != outputs or entry.shape[1] * each < groups:
                raise misfit(name, entry, (outputs, -(-groups // each)), self.where)
        held = FileRange(codes.file, codes.offset, codes.length, ir.DataType.UINT4, (outputs, inputs), codes.linkable)
        return Quantized(
            held.tensor(names[0]),
            lazy(names[2], scales.dtype, (outputs, groups), lambda: scales.tensor("").numpy()[:, :groups]),
            lazy(
                names[1],
                ir.DataType.UINT4,
                (outputs, groups),
                lambda: spread(words(zeros), range(8), 4)[:groups].T,
            ),
            1,
            group,
        )
