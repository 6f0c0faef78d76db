"""A weight of few bits is the same in every form that a pass gives it, and it gives the numbers of the dense one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import example, given
from hypothesis import strategies as st

from backends.onnxruntime.session import FOLDED
from passes.quantize_weights import QuantizeWeights
from qeff_ir.arrays import Array
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.numerics import UNIT_ROUNDOFF
from qeff_ir.passing import Pipeline, Rewriter, run_pipeline
from qeff_ir.passing.weights import Stored, repeated, side_by_side
from qeff_ir.quantized import Quantized, dequantized, lazy, quantized

RANGES = {
    "UINT4": np.arange(16), "INT4": np.arange(-8, 8), "UINT8": np.arange(256), "INT8": np.arange(-128, 128),
    "FLOAT4E2M1": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6]),
    "FLOAT8E4M3FN": np.array([0, 0.5, -0.75, 1.125, 3, -44, 0.25, -2.5]),
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A drawn one: ``[*outer, outputs, inputs]``, or turned."""

    outputs: int
    inputs: int
    block: int
    codes: str
    zeros: bool
    turned: bool = False
    table: bool = False
    experts: int = 0
    seed: int = 0

    def parts(self) -> Quantized:
        rng, axis = np.random.default_rng(self.seed), 0 if self.turned else 2 if self.experts else 1
        shape = (self.inputs, self.outputs) if self.turned else (self.outputs, self.inputs)
        shape = (self.experts, *shape) if self.experts else shape
        blocks = tuple(-(-d // self.block) if n == axis else d for n, d in enumerate(shape))
        dtype, values = ir.DataType[self.codes], RANGES[self.codes]

        def part(name: str, shape: tuple[int, ...]) -> ir.LazyTensor:
            numbers = rng.choice(values, shape).astype(dtype.numpy())
            return lazy(name, dtype, shape, lambda: numbers)

        scales = ir.tensor((rng.random(blocks) * 0.1 + 0.01).astype(np.float32))
        return Quantized(
            part("w", shape),
            scales,
            part("w", blocks) if self.zeros and "FLOAT8" not in self.codes else None,
            axis,
            self.block,
        )

    def module(self) -> Module:
        """Products and look-ups of the weight: ``x @ w``, and rows of it."""
        tensor = dequantized("w", self.parts())
        value = ir.val("w", ir.DataType.FLOAT, tensor.shape, const_value=tensor)
        value.metadata_props[WEIGHT_KEY] = "w"
        x, rows = ir.val("x", ir.DataType.FLOAT, [2, 3, self.inputs]), ir.val("rows", ir.DataType.INT64, [2, 3])
        nodes: list[ir.Node] = []
        if not self.experts:
            nodes += [] if self.turned else [ir.node("Transpose", [value], {"perm": [1, 0]})]
            nodes += [ir.node("MatMul", [x, value if self.turned else nodes[0].outputs[0]])]
            nodes[-1].outputs[0].shape = ir.Shape([2, 3, self.outputs])
        if self.table or self.experts:
            nodes += [ir.node("Gather", [value, rows])]
            sizes = [self.outputs, self.inputs] if self.experts else [self.inputs]
            nodes[-1].outputs[0].shape = ir.Shape([2, 3, *sizes])
        answers = [n.outputs[0] for n in nodes if n.op_type != "Transpose"]
        for number, answer in enumerate(answers):
            answer.name, answer.dtype = f"out{number}", ir.DataType.FLOAT
        used = [x, rows] if len(answers) == 2 else [rows] if self.experts else [x]
        graph = ir.Graph(used, answers, nodes=nodes, initializers=[value], opset_imports={"": 23}, name="g")
        return Module(ir.Model(graph, ir_version=11), "Drawn")


def inputs(module: Module, top: int) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    shapes = {str(v.name): tuple(v.shape.numpy()) for v in module.graph.inputs if v.shape is not None}
    made = {"x": lambda s: rng.standard_normal(s).astype(np.float32), "rows": lambda s: rng.integers(0, top, s)}
    return {name: made[name](shape) for name, shape in shapes.items()}


def answers(module: Module, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.add_session_config_entry(*FOLDED)
    with tempfile.TemporaryDirectory() as folder:
        path = str(save_module(module, Path(folder)))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, feeds))  # pyright: ignore[reportReturnType, reportArgumentType]


BLOCKS = st.sampled_from([8, 16, 32, 48, 64, 128, 1 << 20])
WEIGHTS = st.builds(
    Weight, st.integers(1, 40), st.integers(2, 90), BLOCKS, st.sampled_from(list(RANGES)), st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
KINDS = st.sampled_from([{}, {"turned": True}, {"table": True}, {"experts": 3}])


@example(Weight(9, 64, 32, "INT4", zeros=True), {}, "ort-matmul-nbits")  # whole blocks, as the file has them
@example(Weight(5, 40, 16, "FLOAT4E2M1", zeros=False), {"experts": 2}, "ort-matmul-nbits")
@example(Weight(30, 72, 48, "UINT4", zeros=True), {"table": True}, "ort-matmul-nbits")
@given(WEIGHTS, KINDS, st.sampled_from(["ort-matmul-nbits", "nbits,dequantize", "dequantize"]))
def test_every_form_gives_the_numbers_of_the_dense_one(weight: Weight, kind: dict[str, Any], text: str) -> None:
    weight = replace(weight, **kind)
    module = weight.module()
    dense = weight.parts().numbers()
    report = run_pipeline(module, Pipeline.parse(text), check=3)
    fired = {name for run in report.runs for name in run.stats.fired}
    feeds = inputs(module, weight.experts or len(dense))
    wanted: list[tuple[Array, Array]] = []
    if not weight.experts:
        w, x = (dense if weight.turned else dense.T).astype(np.float64), feeds["x"].astype(np.float64)
        wanted.append((x @ w, (weight.inputs + 3) * UNIT_ROUNDOFF * (np.abs(x) @ np.abs(w))))
    if "rows" in feeds:
        wanted.append((dense[feeds["rows"]], np.zeros(1)))
    for found, (right, slack) in zip(answers(module, feeds), wanted, strict=True):
        assert found.shape == right.shape and (np.abs(found - right) <= slack).all()
    left = [v for v in module.graph.initializers.values() if quantized(v.const_value) is not None]
    fits = (weight.block % 16 == 0 or weight.block >= weight.inputs) and "FLOAT8" not in weight.codes
    four = "4" in weight.codes and "FLOAT" not in weight.codes
    if text == "ort-matmul-nbits":
        assert (not left) == (fits and (four or bool(weight.experts))), report.runs[0].stats.missed
        assert bool(left) == bool([m for m in report.runs[0].stats.missed if "is float32 in memory" in m.reason])
    else:
        assert not left
        alone = not weight.table and not weight.experts
        assert ("MatMulNBits" in fired) == (text != "dequantize" and fits and four and alone)


MOVES = st.sampled_from(["side by side", "repeated"])


@given(WEIGHTS, st.booleans(), MOVES)
def test_numbers_that_are_only_moved_keep_their_codes(weight: Weight, turned: bool, move: str) -> None:
    weight = replace(weight, turned=turned)
    module = weight.module()
    value, rewriter = module.graph.initializers["w"], Rewriter(module, "test")
    dense, axis = weight.parts().numbers(), 1 if turned else 0
    if move == "repeated":
        made, wanted = repeated(rewriter, "made", value, axis, 1, 2), np.repeat(dense, 2, axis=axis)
    else:
        made = side_by_side(rewriter, "made", [Stored(value, not turned)] * 2).value
        wanted = np.concatenate([dense, dense], axis=axis)
    parts = quantized(made.const_value)
    assert parts is not None and parts.problem() is None and parts.codes.dtype.name == weight.codes
    assert made.const_value is not None and np.array_equal(made.const_value.numpy(), wanted)
    other = repeated(rewriter, "other", value, 1 - axis, 1, 2)  # which moves numbers away from their scales
    assert quantized(other.const_value) is None and other.const_value is not None
    assert np.array_equal(other.const_value.numpy(), np.repeat(dense, 2, axis=1 - axis))


def plainly(rows: Array, block: int, top: int, symmetric: bool) -> float:
    """Squared error of rounding each block between its own ends, number by number."""
    error = 0.0
    for row in rows.astype(np.float64):
        for part in (row[at : at + block] for at in range(0, len(row), block)):
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            if symmetric:
                high = float(np.abs(part).max()) * top / (top + 1)
                low = -high
            step = (high - low) / top or 1.0
            zero = (top + 1) // 2 if symmetric else round(-low / step)
            error += sum((np.clip(round(x / step) + zero, 0, top) * step - zero * step - x) ** 2 for x in part)
    return error


@given(WEIGHTS, st.booleans(), st.sampled_from([4, 8]), st.sampled_from([16, 64]), st.booleans())
def test_rounding_errs_no_more_than_between_the_ends_of_each_block(
    weight: Weight, turned: bool, bits: Literal[4, 8], block: int, symmetric: bool
) -> None:
    weight = replace(weight, turned=turned, table=not turned)
    module = weight.module()
    dense = np.random.default_rng(weight.seed).standard_normal(weight.parts().shape).astype(np.float32)
    module.graph.initializers["w"].const_value = ir.tensor(dense, name="w")
    run_pipeline(module, Pipeline((QuantizeWeights(bits=bits, block=block, symmetric=symmetric),)), check=3)
    parts = quantized(module.graph.initializers["w"].const_value)
    assert parts is not None and parts.problem() is None and parts.axis == (0 if turned else 1)
    assert parts.codes.dtype.bitwidth == bits and parts.block <= block
    made = parts.numbers()
    limit = plainly(dense.T if turned else dense, parts.block, 2**bits - 1, symmetric)
    assert 0 < np.square(made - dense, dtype=np.float64).sum() <= 1.2 * limit + 1e-9
    with tempfile.TemporaryDirectory() as folder:
        back = load_module(save_module(module, Path(folder))).graph.initializers["w"].const_value
        assert quantized(back) is not None and back is not None and np.array_equal(back.numpy(), made)
