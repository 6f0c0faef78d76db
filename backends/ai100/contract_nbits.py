"""Check products with weights of 4 bits against the AI 100 contract (§2.3): one part of `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from backends.ai100.violation import Violation

NATIVE = "com.microsoft"
"""Domain of operators that the compiler takes without a body."""


def nbits(node: gs.Node) -> Iterator[Violation]:
    """``MatMulNBits(A, B, scales, zero_points)``: 4 bits, each weight as long as `K`, `N` and `block_size` say."""
    if (node.domain, node.op) != (NATIVE, "MatMulNBits"):
        return
    sizes = [node.attrs.get(name, 0) for name in ("N", "K", "block_size", "bits")]
    outputs, inputs, block, bits = (size if isinstance(size, int) else 0 for size in sizes)
    if bits != 4 or min(outputs, inputs) < 1 or block < 2 or block % 2:
        yield Violation("nbits", f"{node.name} multiplies with codes of {bits} bits in blocks of {block}: use 4 bits")
        return
    blocks = -(-inputs // block)
    wanted: list[tuple[str, Any, list[int]]] = [
        ("codes", np.uint8, [outputs, blocks, block // 2]),
        ("scales", np.float32, [outputs * blocks]),
        ("zero points", np.uint8, [outputs * -(-blocks // 2)]),
    ]
    if len(node.inputs) != 4:
        yield Violation("nbits", f"{node.name} has {len(node.inputs)} inputs, not codes, scales and zero points alone")
        return
    for (what, dtype, shape), tensor in zip(wanted, node.inputs[1:], strict=True):
        if tensor.dtype is None:
            continue  # of a function, which gets its weights from where it is called
        if tensor.dtype != dtype or list(tensor.shape or []) != shape:
            found = f"{np.dtype(tensor.dtype)} {list(tensor.shape or [])}"
            yield Violation("nbits", f"the {what} of {node.name} are {found}, not {np.dtype(dtype)} {shape}")
