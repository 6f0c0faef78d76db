"""compressed-tensors: codes of 4 or 8 bits, in words or in bytes, and a scale for a group of inputs.

Format: https://github.com/vllm-project/compressed-tensors. Of a weight ``[out, in]`` (or ``[experts, out, in]``), a
file has ``weight_scale``, ``[out, groups]`` (``[out, 1]`` of whole rows, ``[1]`` of all) and

- ``pack-quantized``: ``weight_packed`` int32 ``[out, in * bits / 32]``, the first code in the lowest bits, with an
  offset of half the range; ``weight_shape``; ``weight_zero_point``, packed like the codes, but along ``out``, where the
  grid is not symmetric; in older files ``weight_g_idx``, the group of each input, where these were sorted
- ``int-quantized``, ``float-quantized``, ``naive-quantized``: ``weight``, int8 or F8_E4M3, of which blocks of rows and
  columns may have a scale; ``weight_zero_point`` of int8
- ``nvfp4-pack-quantized``: ``weight_packed`` uint8 ``[out, in / 2]``, E2M1 with the first number in the low half of a
  byte; scales of F8_E4M3, which are divided by ``weight_global_scale``
- ``mxfp4-pack-quantized``: the same with exponents for scales

A number is ``(code - zero) * scale`` in float32. transformers multiplies in the type of the scales, which rounds each
weight where that is bfloat16 or float16: its numbers are these to the bit if it is given float32 scales, as it is for
`qeff_ir.frontend.providers.stored.Stored.reference`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from qeff_ir.arrays import Array
from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.checkpoint.formats import Decoded, WeightFormat
from qeff_ir.frontend.checkpoint.formats.grid import gridded
from qeff_ir.quantized import Quantized, dequantized, lazy
from qeff_ir.ranges import FileRange

_FORMATS = frozenset(
    {
        "pack-quantized",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
    }
)
_REFUSED = {
    "sparsity_config": "leaves out numbers that are zero",
    "transform_config": "rotates activations while the model runs",
    "moe_sparsity_config": "leaves out experts",
}
_CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_BYTES = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN})
_PARTS = ("scale", "zero_point", "shape", "g_idx", "global_scale")
"""What a weight may have beside its codes."""


class CompressedTensors(WeightFormat):
    """Which modules are quantized and how shows in the file; `settings` are asked for what does not."""

    methods = ("compressed-tensors",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.where, self.settings = where, settings
        for name, what in _REFUSED.items():
            if settings.get(name) not in (None, {}, {"format": "dense"}):
                raise UnsupportedModelError(f"{where} {what} ({name} in quantization_config), which is not read")
        named: object = settings.get("config_groups")
        groups = list(cast("dict[str, Any]", named).values()) if isinstance(named, dict) else []
        if not groups or not all(
            isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in groups
        ):
            raise UnsupportedModelError(f"{where} names no groups of weights (config_groups), or some without weights")
        self.groups = cast("list[dict[str, Any]]", groups)
        for form in {str(group.get("format") or settings.get("format")) for group in self.groups}:
            if form not in _FORMATS:
                raise UnsupportedModelError(
                    f"{where}: the format {form!r:.60} is not read: {', '.join(sorted(_FORMATS))} are"
                )
        of_runs = [n for n in ("input_activations", "output_activations") if any(g.get(n) for g in self.groups)]
        of_runs += [name for name in ("kv_cache_scheme",) if settings.get(name)]
        if of_runs:
            warnings.warn(
                f"{where}: only the weights are quantized, {' and '.join(of_runs)} have no effect", stacklevel=2
            )

    def weights(self, entries: Mapping[str, FileRange]) -> Iterator[Decoded]:
        """See `WeightFormat.weights`."""
        for key, entry in entries.items():
            if key.endswith("_packed"):
                yield self._weight(key.removesuffix("_packed"), key, entries)
            elif f"{key}_scale" in entries:
                if entry.dtype not in _BYTES:
                    raise self._wrong(key, f"is of {entry.dtype}, and has a scale: it was not saved as compressed")
                yield self._weight(key, key, entries)

    def _weight(self, key: str, codes: str, entries: Mapping[str, FileRange]) -> Decoded:
        names = {part: f"{key}_{part}" for part in _PARTS if f"{key}_{part}" in entries}
        found = {part: entries[name] for part, name in names.items()}
        if "scale" not in found:
            raise self._wrong(key, f"lacks '{key}_scale'")
        entry = entries[codes]
        if codes == key or entry.dtype == ir.DataType.UINT8:
            parts = self._bytes(key, entry, found)
        else:
            parts = self._words(key, entry, found)
        groups = self._groups(key, found, parts)
        tensor = dequantized(key, parts) if groups is None else _sorted(key, parts, groups)
        return Decoded(key, tensor, (codes, *names.values()))

    def _bytes(self, key: str, codes: FileRange, found: Mapping[str, FileRange]) -> Quantized:
        """A weight whose codes ONNX has in this order, in a byte each or two in one."""
        scales, block = found["scale"], next((b for b in map(_block, self.groups) if b), None)
        if codes.dtype == ir.DataType.UINT8:
            codes = replace(codes, dtype=ir.DataType.FLOAT4E2M1, shape=(*codes.shape[:-1], 2 * codes.shape[-1]))
        by, zeros = found.get("global_scale"), found.get("zero_point")
        told = f"is of {codes.dtype} {list(codes.shape)}, and has scales of {scales.dtype} {list(scales.shape)}"
        if (by is None) == (scales.dtype == ir.DataType.FLOAT8E4M3FN) or "shape" in found or len(codes.shape) < 2:
            raise self._wrong(key, told)
        if by is not None:
            return self._divided(key, codes, scales, by)
        parts = gridded(key, codes, scales, block)
        if parts is None:
            raise self._wrong(key, told)
        if zeros is None:
            return parts
        if zeros.dtype != codes.dtype or zeros.shape != scales.shape or codes.dtype != ir.DataType.INT8:
            raise self._wrong(key, f"is of {codes.dtype}, and has zero points of {zeros.dtype} {list(zeros.shape)}")
        grid, blocks = zeros.tensor(key), tuple(int(d) for d in parts.scales.shape.numpy())
        return replace(parts, zeros=lazy(key, zeros.dtype, blocks, lambda: _spread(grid.numpy(), blocks)))

    def _divided(self, key: str, codes: FileRange, scales: FileRange, by: FileRange) -> Quantized:
        """A weight whose scales are numbers of a byte, all of them divided by one number."""
        stored, one = scales.tensor(key), by.tensor(key)
        made = lazy(key, ir.DataType.FLOAT, scales.shape, lambda: stored.numpy().astype(np.float32) / one.numpy())
        block = codes.shape[-1] // (scales.shape[-1] if scales.shape and scales.shape[-1] else 1)
        parts = Quantized(codes.tensor(key), made, None, len(codes.shape) - 1, block)
        if parts.problem() is not None or by.dtype != ir.DataType.FLOAT or int(np.prod(by.shape)) != 1:
            raise self._wrong(key, f"{parts.problem()}, divided by {by.dtype} {list(by.shape)}")
        return parts

    def _words(self, key: str, packed: FileRange, found: Mapping[str, FileRange]) -> Quantized:
        """A weight whose codes lie in words; those of 4 and 8 bits are in a file as ONNX has them."""
        scales, sizes = found["scale"], found.get("shape")
        shape = (0,) if sizes is None else tuple(int(size) for size in sizes.tensor(key).numpy().reshape(-1))
        asked = {group["weights"].get("num_bits") for group in self.groups}
        bits = next((b for b in _CODES if b in asked and _in_words(shape, b) == packed.shape), None)
        told = f"is of {list(shape)} in {packed.dtype} {list(packed.shape)}"
        if bits is None or packed.dtype != ir.DataType.INT32:
            raise self._wrong(key, f"{told}, which are not the codes of {' or '.join(map(str, sorted(asked)))} bits")
        dtype, half = _CODES[bits], 1 << (bits - 1)
        if shape[-1] * bits % 32 == 0:
            codes: ir.TensorProtocol = replace(packed, dtype=dtype, shape=shape).tensor(key)
        else:
            words = packed.tensor(key)
            codes = lazy(key, dtype, shape, lambda: _codes(words.numpy(), bits, shape[-1]))
        parts = gridded(key, replace(packed, dtype=dtype, shape=shape), scales)
        if parts is None:
            raise self._wrong(key, f"{told}, and has scales of {scales.dtype} {list(scales.shape)}")
        blocks = tuple(int(d) for d in parts.scales.shape.numpy())
        return replace(parts, codes=codes, zeros=self._zeros(key, blocks, bits, half, found))

    def _zeros(
        self, key: str, blocks: tuple[int, ...], bits: int, half: int, found: Mapping[str, FileRange]
    ) -> ir.TensorProtocol:
        dtype, entry = _CODES[bits], found.get("zero_point")
        if entry is None:
            return lazy(key, dtype, blocks, lambda: np.full(blocks, half, np.uint8))
        stored = entry.tensor(key)
        if entry.dtype == ir.DataType.INT8 and entry.shape == found["scale"].shape:
            return lazy(
                key, dtype, blocks, lambda: _spread(stored.numpy().astype(np.int16) + half, blocks).astype(np.uint8)
            )
        *outer, rows, groups = blocks
        if entry.dtype != ir.DataType.INT32 or entry.shape != (*outer, -(-rows * bits // 32), groups):
            raise self._wrong(key, f"has zero points of {entry.dtype} {list(entry.shape)}, and needs those of {blocks}")

        def unpacked() -> Array:
            return _codes(stored.numpy().swapaxes(-1, -2), bits, rows).swapaxes(-1, -2)

        return lazy(key, dtype, blocks, unpacked)

    def _groups(self, key: str, found: Mapping[str, FileRange], parts: Quantized) -> Array | None:
        """The group of each input, where groups are not of neighbors."""
        if "g_idx" not in found:
            return None
        groups, columns = found["g_idx"].tensor(key).numpy(), parts.shape[-1]
        count = int(parts.scales.shape.numpy()[-1])
        if np.array_equal(groups, np.arange(columns) // parts.block) or (groups == -1).all():  # -1: not used
            return None
        if groups.shape != (columns,) or groups.max() >= count or groups.min() < 0:
            raise self._wrong(key, f"has groups of {list(groups.shape)} inputs that are not {count} of {columns}")
        return groups

    def reference(self, decoded: Mapping[str, Decoded], entries: Mapping[str, FileRange]) -> dict[str, Any] | None:
        """See `WeightFormat.reference`: transformers takes all weights for those of one group, and not all experts."""
        schemes = [(group["weights"], group.get("format") or self.settings.get("format")) for group in self.groups]
        if importlib.util.find_spec("compressed_tensors") is None or any(scheme != schemes[0] for scheme in schemes):
            return None
        for key, found in decoded.items():
            ends = {part.removeprefix(key) for part in found.parts}
            codes = entries[found.parts[0]].dtype
            if codes == ir.DataType.UINT8 or "_g_idx" in ends:
                return None
            if ".experts." in key and (codes == ir.DataType.INT8 or "_zero_point" in ends):
                return None
        return {**self.settings, "dequantize": True}

    def _wrong(self, key: str, what: str) -> ModelLoadError:
        return ModelLoadError(f"the weight '{key}' in the checkpoint of {self.where} {what}: download the model again")


def _block(group: Mapping[str, Any]) -> list[int] | None:
    """Rows and columns of the blocks of a group."""
    found: object = group["weights"].get("block_structure")
    block = cast("list[object]", found) if isinstance(found, list) else []
    return cast("list[int]", block) if len(block) == 2 and all(type(size) is int for size in block) else None


def _in_words(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] * bits // 32))


def _codes(words: Array, bits: int, count: int) -> Array:
    """The codes in the words of the last axis, one in a byte."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :count].astype(np.uint8)


def _spread(grid: Array, shape: tuple[int, ...]) -> Array:
    """What blocks of rows have, for each row."""
    if grid.size == 1:
        return np.broadcast_to(grid.reshape(-1)[0], shape)
    return grid.repeat(-(-shape[-2] // grid.shape[-2]), axis=-2)[..., : shape[-2], :]


def _sorted(key: str, parts: Quantized, groups: Array) -> ir.LazyTensor:
    """A weight whose inputs were sorted: blocks of an ONNX weight have neighbors, so that it is float32."""

    def read() -> Array:
        scales = parts.scales.numpy().astype(np.float32)[..., groups]
        zeros = 0 if parts.zeros is None else parts.zeros.numpy().astype(np.float32)[..., groups]
        return (parts.codes.numpy().astype(np.float32) - zeros) * scales

    return lazy(key, ir.DataType.FLOAT, parts.shape, read)
