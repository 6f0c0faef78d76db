"""Writing a package takes the memory of the largest tensor that is written, whatever the model's size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from backends.ai100 import weight_free
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.storage import save_model

COUNT, SIZE = 12, 1 << 20
LARGEST = 4 * SIZE
"""Bytes of one tensor."""


def model(cache: bool) -> ir.Model:
    """Sums of tensors that are computed when they are asked for, and kept if `cache`."""
    total = ir.val("x", ir.DataType.FLOAT, [SIZE])
    graph = ir.Graph([total], [], nodes=[], name="sums", opset_imports={"": 24})
    for index in range(COUNT):

        def compute(index: int = index) -> ir.TensorProtocol:
            return ir.tensor(np.full(SIZE, index, dtype=np.float32))

        tensor = ir.LazyTensor(compute, ir.DataType.FLOAT, ir.Shape([SIZE]), name=f"w{index}", cache=cache)
        weight = ir.Value(name=f"w{index}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([SIZE]))
        weight.const_value = tensor
        weight.metadata_props[WEIGHT_KEY] = f"w{index}"
        graph.register_initializer(weight)
        node = ir.node("Add", [total, weight])
        graph.append(node)
        total = node.outputs[0]
        total.name, total.type, total.shape = f"y{index}", weight.type, weight.shape
    graph.outputs.append(total)
    return ir.Model(graph, ir_version=11)


def peak(save: Callable[[ir.Model, Path], None], made: ir.Model, folder: Path) -> int:
    """Most bytes that were allocated at a time while `made` was saved."""
    tracemalloc.start()
    try:
        save(made, folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def usual(made: ir.Model, folder: Path) -> None:
    save_model(made, folder, "sums.onnx")


def free(made: ir.Model, folder: Path) -> None:
    weight_free.save(made, folder, "sums.onnx", "sums")


@pytest.mark.parametrize("save", [usual, free])
def test_one_tensor_is_in_memory_at_a_time(save: Callable[[ir.Model, Path], None], tmp_path: Path) -> None:
    assert LARGEST <= peak(save, model(cache=False), tmp_path / "a") < 3 * LARGEST
    written = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert written >= COUNT * LARGEST
    # The measurement sees tensors that are kept.
    assert peak(save, model(cache=True), tmp_path / "b") >= COUNT * LARGEST
