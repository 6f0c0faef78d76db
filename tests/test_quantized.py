"""Codes, scales and zeros are the numbers that ONNX makes of them, and stay what they are in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, VerificationError
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.ir.verifier import verify
from qeff_ir.quantized import Quantized, dequantized, forget, lazy, quantized, spell
from qeff_ir.storage import load_model, save_model
from tests.support import lowered

CODES = {
    ir.DataType.UINT4: 16,
    ir.DataType.INT4: 16,
    ir.DataType.UINT8: 256,
    ir.DataType.INT8: 256,
    ir.DataType.FLOAT8E4M3FN: 126,  # what follows is no number
}


def parts(
    dtype: ir.DataType,
    shape: tuple[int, ...],
    axis: int,
    block: int,
    zeros: bool,
    seed: int = 0,
    scale: Any = np.float32,
) -> Quantized:
    """Random codes and scales."""
    rng = np.random.default_rng(seed)
    blocks = tuple(-(-size // block) if a == axis else size for a, size in enumerate(shape))

    def codes(sizes: tuple[int, ...]) -> ir.TensorProtocol:
        return ir.Tensor(rng.integers(0, CODES[dtype], sizes).astype(np.uint8).view(dtype.numpy()), dtype=dtype)

    scales = ir.tensor(rng.uniform(0.1, 2, blocks).astype(scale))
    return Quantized(codes(shape), scales, codes(blocks) if zeros else None, axis, block)


def model_of(weight: Quantized) -> ir.Model:
    """A graph that returns a weight and takes nothing."""
    value = ir.val("w", ir.DataType.FLOAT, ir.Shape(weight.shape), const_value=dequantized("w", weight))
    out = ir.val("y", ir.DataType.FLOAT, ir.Shape(weight.shape))
    graph = ir.Graph([], [out], nodes=[ir.node("Identity", [value], outputs=[out])], initializers=[value], name="g")
    graph.opset_imports[""] = 21
    return ir.Model(graph, ir_version=10)


def computed(path: Path) -> Array:
    """What ONNX Runtime makes of a file."""
    return np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})[0])


@given(
    dtype=st.sampled_from(sorted(CODES)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    axis=st.integers(0, 1),
    block=st.sampled_from([1, 2, 3, 16, 32, 70]),
    zeros=st.booleans(),
    scale=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_numbers_are_those_of_onnx(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: ir.DataType,
    rows: int,
    columns: int,
    axis: int,
    block: int,
    zeros: bool,
    scale: Any,
    seed: int,
) -> None:
    zeros = zeros and dtype.is_integer()  # of floating codes, ONNX has no zeros but 0
    weight = parts(dtype, (rows, columns), axis, block, zeros, seed, scale)
    assert weight.problem() is None
    folder = tmp_path_factory.mktemp("model")
    save_model(model_of(weight), folder, "model.onnx")
    assert [n.op_type for n in onnx.load(folder / "model.onnx").graph.node] == ["DequantizeLinear", "Identity"]
    mine = weight.numbers()
    assert mine.dtype == np.float32 and np.any(mine)
    np.testing.assert_array_equal(mine, computed(folder / "model.onnx"))
    again = quantized(load_model(folder / "model.onnx").graph.initializers["w"].const_value)
    assert again is not None and (again.axis, again.block) == (axis, block)
    np.testing.assert_array_equal(again.numbers(), mine)
    if axis == 1:
        np.testing.assert_array_equal(again.numbers([rows - 1, 0]), mine[[rows - 1, 0]])


def test_packed_bytes_are_two_codes_each() -> None:
    made = lazy("w", ir.DataType.UINT4, (2, 3), lambda: np.array([0x21, 0x43, 0x65], np.uint8), packed=True)
    assert made.numpy().astype(int).tolist() == [[1, 2, 3], [4, 5, 6]] and made.nbytes == 3


def quantized_module() -> Any:
    """A decoder two of whose weights have blocks."""
    module = lowered("llama")
    names = [n for n in module.graph.initializers if n.endswith(("up_proj.weight", "embed_tokens.weight"))]
    for index, name in enumerate(names):
        value = module.graph.initializers[name]
        assert value.shape is not None
        shape = tuple(int(d) for d in value.shape.numpy())
        value.const_value = dequantized(name, parts(ir.DataType.UINT4, shape, 1, 16, zeros=index > 0))
    assert len(names) == 3
    return module


def test_saving_and_loading_is_the_identity(tmp_path: Path) -> None:
    module = quantized_module()
    verify(module)
    path = save_module(module, tmp_path / "one")
    once = load_module(path)
    assert to_text(once) == to_text(module)
    assert to_text(module).count("of uint4, a scale for 16 along axis 1") == 3
    assert list(once.graph.initializers) == list(module.graph.initializers)
    for name, value in module.graph.initializers.items():
        mine, theirs = quantized(value.const_value), quantized(once.graph.initializers[name].const_value)
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            np.testing.assert_array_equal(mine.numbers(), theirs.numbers())
    assert save_module(once, tmp_path / "two").read_bytes() == path.read_bytes()
    assert len(forget(once.model)) == 3 and "uint4" not in to_text(once)


def test_an_opset_without_blocks_is_refused(tmp_path: Path) -> None:
    model = model_of(parts(ir.DataType.UINT4, (4, 32), 1, 16, zeros=False))
    model.opset_imports[""] = 17
    with pytest.raises(PackageError, match="w has blocks, which opset 17 does not know: put the pass dequantize"):
        save_model(model, tmp_path, "model.onnx")


GOOD = parts(ir.DataType.UINT4, (4, 32), 1, 16, zeros=True)
BAD = {
    "has scales [4, 2]: blocks of 8 need [4, 4]": Quantized(GOOD.codes, GOOD.scales, GOOD.zeros, 1, 8),
    "has 2 axes, and blocks of 16 along axis 2": Quantized(GOOD.codes, GOOD.scales, GOOD.zeros, 2, 16),
    "has zeros of FLOAT [4, 2]: the codes need UINT4 [4, 2]": Quantized(GOOD.codes, GOOD.scales, GOOD.scales, 1, 16),
    "has codes of FLOAT and scales of FLOAT": Quantized(GOOD.scales, GOOD.scales, None, 1, 1),
}


@pytest.mark.parametrize("problem", BAD)
def test_parts_that_do_not_fit_break_a_rule_of_the_ir(problem: str) -> None:
    assert GOOD.problem() is None and BAD[problem].problem() == problem
    module = lowered("llama")
    name = next(n for n in module.graph.initializers if n.endswith("up_proj.weight"))
    value = module.graph.initializers[name]
    value.const_value = dequantized(name, BAD[problem])
    value.shape = ir.Shape(BAD[problem].shape)
    with pytest.raises(VerificationError) as told:
        verify(module)
    assert told.value.code == "initializer" and problem in str(told.value)


def _another_block(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "block_size").i = 8


def _another_operator(node: onnx.NodeProto) -> None:
    node.op_type = "Mul"


def _no_mark(node: onnx.NodeProto) -> None:
    del node.metadata_props[:]


@pytest.mark.parametrize("damage", [_another_block, _another_operator, _no_mark])
def test_only_its_own_nodes_are_folded(damage: Any, tmp_path: Path) -> None:
    save_model(model_of(GOOD), tmp_path, "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    damage(proto.graph.node[0])
    onnx.save(proto, tmp_path / "model.onnx")
    found = load_model(tmp_path / "model.onnx")
    assert [n.op_type for n in found.graph] == [n.op_type for n in proto.graph.node] and len(found.graph) == 2


def test_a_weight_that_is_returned_stays_as_it_is() -> None:
    model = model_of(GOOD)
    model.graph.outputs[0] = model.graph.initializers["w"]
    spell(model)
    assert [n.op_type for n in model.graph] == ["Identity"]
