"""Plain ONNX models that no frontend made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qeff_ir.debug.plain import load_onnx
from qeff_ir.ir.module import Module


def write_plain(path: Path, width: int = 16) -> Path:
    """``Relu(x @ w) + x @ w``, one dim named and one not."""
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Add", ["r", "h"], ["y"]),
        ],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", None, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", None, width])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    return path


def plain(folder: Path) -> Module:
    return load_onnx(write_plain(folder / "plain.onnx"))
