"""Caches that the card keeps as MXINT8, as the emulator keeps them: float32 numbers that have such a form.

Format: OCP Microscaling Formats (MX) Specification 1.0, §5.3.4 and §6.3. Of a block of numbers whose largest has the
exponent ``e``, each is a whole number of ``2 ** (e - 6)`` from -127 to 127. Blocks of 32 lie along the last axis; they
are shorter where 32 does not divide it. What is rounded once stays as it is when it is rounded again.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from backends.ai100.emit import CUSTOM_IO
from backends.ai100.qnn.files import FORMATS
from qeff_ir.arrays import Array

_ENTRY = re.compile(r"IOName: (\S+)\n\s*Precision: mxint8\b")


def compressed(folder: Path) -> frozenset[str]:
    """Names of the states that the files beside a model ask for in MXINT8."""
    listed, formats = folder / CUSTOM_IO, folder / FORMATS
    found = set(_ENTRY.findall(listed.read_text())) if listed.is_file() else set[str]()
    graphs: list[Any] = json.loads(formats.read_text())["graphs"] if formats.is_file() else []
    return frozenset(found | {tensor["tensor_name"] for graph in graphs for tensor in graph["tensors"]})


def rounded(numbers: Array) -> Array:
    """The nearest numbers that MXINT8 has, of the same shape, float32."""
    block = math.gcd(numbers.shape[-1], 32)
    blocks = numbers.astype(np.float64).reshape(*numbers.shape[:-1], -1, block)
    most = np.abs(blocks).max(-1, keepdims=True)
    _, exponents = np.frexp(np.where(most > 0, most, 1.0))  # of a number from 0.5 to 1
    steps = np.exp2(exponents - 1.0 - 6.0)
    return (np.clip(np.rint(blocks / steps), -127, 127) * steps).astype(np.float32).reshape(numbers.shape)
