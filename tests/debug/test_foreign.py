"""ONNX files of other exporters: what they leave open, how they spell it, and the names that they give to a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qeff_ir.debug.drive import is_decoder, make_plan
from qeff_ir.debug.equivalence import Equivalence
from qeff_ir.debug.plain import load_onnx
from qeff_ir.errors import ModelLoadError, PassError, QeffError, RuntimeInputError
from qeff_ir.ir.module import Module
from qeff_ir.ir.snapshot import save_module
from qeff_ir.passing.base import Pass, Rewriter
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
WEIGHT = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
typed = helper.make_tensor_value_info
X = typed("x", FLOAT, ["n", 8])
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"])


def write(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], ir_version: int = 10) -> Path:
    """A file of these nodes, with the weight ``w``."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(WEIGHT, "w")])
    imports = [helper.make_opsetid("", 9 if ir_version < 4 else 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "foreign.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=ir_version), path)
    return path


def optimized(path: Path, check: int) -> Any:
    module = load_onnx(path)
    instruments = [Equivalence()] if check == 4 else []
    run_pipeline(module, Pipeline.parse("canonicalize"), instruments=instruments, check=check)
    return ort.InferenceSession(save_module(module, path.parent / "out"))


OUTPUTS: dict[str, tuple[list[Any], list[Any]]] = {
    "open": ([typed("y", FLOAT, ["n", None])], ["n", 8]),
    "all open": ([typed("y", FLOAT, [None, None])], ["y_dim_0", 8]),
    "named": ([typed("y", FLOAT, ["n", "MatMuly_dim_1"])], ["n", 8]),
    "no shape": ([typed("y", FLOAT, None)], ["n", 8]),
    "no type": ([onnx.ValueInfoProto(name="y")], ["n", 8]),
    "an input, last": ([typed("y", FLOAT, ["n", 8]), X], ["n", 8]),
    "an input, first": ([X, typed("y", FLOAT, ["n", None])], ["n", 8]),
    "the weight": ([typed("y", FLOAT, ["n", None]), typed("w", FLOAT, [8, 8])], ["n", 8]),
}


@pytest.mark.parametrize("check", [1, 4])
@pytest.mark.parametrize("case", OUTPUTS)
def test_what_a_file_leaves_open_is_found_and_is_no_other_interface(case: str, check: int, tmp_path: Path) -> None:
    outputs, shape = OUTPUTS[case]
    session = optimized(write(tmp_path, [PRODUCT], [X], outputs), check)
    assert [v.name for v in session.get_inputs()] == ["x"]
    assert [v.name for v in session.get_outputs()] == [v.name for v in outputs]
    assert next(v.shape for v in session.get_outputs() if v.name == "y") == shape
    x = np.ones((3, 8), np.float32)
    answers = dict(zip([v.name for v in outputs], session.run(None, {"x": x}), strict=True))
    np.testing.assert_allclose(answers.pop("y"), x @ WEIGHT, rtol=1e-5)
    for name, known in answers.items():
        np.testing.assert_array_equal(known, {"x": x, "w": WEIGHT}[name])


@pytest.mark.parametrize("check", [1, 4])
def test_sizes_that_the_model_computes_stay_open(check: int, tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["y"]), helper.make_node("Concat", ["x", "x"], ["z"], axis=0)]
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(2, np.float32)))
    outputs = [typed("y", INT64, None), typed("z", FLOAT, ["twice", None]), typed("c", FLOAT, [2])]
    session = optimized(write(tmp_path, [*nodes, constant], [X], outputs), check)
    assert [v.shape for v in session.get_outputs()] == [[2, "y_dim_1"], ["twice", 8], [2]]


@pytest.mark.parametrize("check", [1, 4])
def test_weights_that_an_old_file_lists_as_inputs_are_weights(check: int, tmp_path: Path) -> None:
    listed = typed("w", FLOAT, [8, 8])
    session = optimized(write(tmp_path, [PRODUCT], [X, listed], [typed("y", FLOAT, ["n", 8])], ir_version=3), check)
    assert [v.name for v in session.get_inputs()] == ["x"]
    x = np.ones((2, 8), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ WEIGHT, rtol=1e-5)


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["h"], ["y"]), helper.make_node("MatMul", ["x", "w"], ["h"])]
    session = optimized(write(tmp_path, nodes, [X], [typed("y", FLOAT, ["n", 8])]), 4)
    x = np.ones((2, 8), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], np.maximum(x @ WEIGHT, 0), rtol=1e-5)


Y = typed("y", FLOAT, ["n", 8])
REFUSED: dict[str, tuple[list[Any], list[Any], list[Any], str]] = {
    "a default value": ([PRODUCT], [X, typed("w", FLOAT, [8, 8])], [Y], "the input 'w' of foreign has a default value"),
    "an input without a shape": ([PRODUCT], [typed("x", FLOAT, None)], [Y], "the input 'x' of foreign has no type or"),
    "a cycle": (
        [helper.make_node("Add", ["h", "x"], ["y"]), helper.make_node("Add", ["y", "x"], ["h"])], [X], [Y],
        "the graph of foreign has a cycle",
    ),
    "nothing makes it": ([helper.make_node("Add", ["h", "x"], ["y"])], [X], [Y], r"\[order\] Add 'y' reads 'h' before"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_when_it_is_read(case: str, tmp_path: Path) -> None:
    nodes, inputs, outputs, reason = REFUSED[case]
    with pytest.raises(QeffError, match=reason):
        load_onnx(write(tmp_path, nodes, inputs, outputs))


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    texts = typed("x", TensorProto.STRING, ["n"])
    for nodes, inputs, outputs, reason in (
        ([helper.make_node("SequenceConstruct", ["x", "x"], ["y"])], [X], [sequence], "'y' of foreign is not a tensor"),
        (
            [helper.make_node("Identity", ["x"], ["y"])],
            [texts],
            [typed("y", TensorProto.STRING, ["n"])],
            "'x' is not a",
        ),
        ([PRODUCT], [typed("x", FLOAT, ["n", None])], [Y], r"\(on random inputs of n=3, x_dim_1=3\)$"),
        ([PRODUCT], [typed("x", FLOAT, [1 << 40, 8])], [typed("y", FLOAT, [1 << 40, 8])], "is too large to be made up"),
    ):
        with pytest.raises(RuntimeInputError, match=reason):
            optimized(write(tmp_path, nodes, inputs, outputs), 4)


def made(change: Any) -> Pipeline:
    @dataclass(frozen=True, slots=True)
    class Made(Pass):
        name: ClassVar[str] = "made"

        def run(self, module: Module, rewriter: Rewriter) -> None:
            change(module, module.graph.outputs[0])

    return Pipeline((Made(),))


def shaped(*dims: int | str | None) -> Any:
    def change(module: Module, output: ir.Value) -> None:
        output.shape = ir.Shape(dims)

    return change


def renamed(module: Module, output: ir.Value) -> None:
    output.name = "z"


def retyped(module: Module, output: ir.Value) -> None:
    output.dtype = ir.DataType.FLOAT16


def swapped(module: Module, output: ir.Value) -> None:
    module.graph.outputs.append(module.graph.outputs.pop(0))


CHANGES: dict[str, tuple[Any, bool]] = {
    "the open size": (shaped("n", 4, 8, "n"), True),
    "the open size, by a symbol": (shaped("n", 4, 8, "own"), True),
    "the size of the output's own name": (shaped("n", 4, 6, "y_dim_3"), True),
    "both": (shaped("n", 4, 6, 5), True),
    "the size of an input's name": (shaped(2, 4, "own", "y_dim_3"), False),
    "another name for it": (shaped("own", 4, "own", "y_dim_3"), False),
    "a known size": (shaped("n", 5, "own", "y_dim_3"), False),
    "a known size, now open": (shaped("n", None, "own", "y_dim_3"), False),
    "a named size, now open": (shaped("n", 4, None, "y_dim_3"), False),
    "fewer axes": (shaped("n", 4, "own"), False),
    "more axes": (shaped("n", 4, "own", "y_dim_3", 1), False),
    "its name": (renamed, False),
    "its type": (retyped, False),
    "the order": (swapped, False),
}


@pytest.mark.parametrize("case", CHANGES)
def test_only_what_was_open_may_be_found(case: str, tmp_path: Path) -> None:
    change, fine = CHANGES[case]
    nodes = [helper.make_node("Unknown", ["x"], [name], domain="com.microsoft") for name in ("y", "z2")]
    outputs = [typed("y", FLOAT, ["n", 4, "own", None]), typed("z2", FLOAT, ["n", 8])]
    module = load_onnx(write(tmp_path, nodes, [X], outputs))
    if fine:
        run_pipeline(module, made(change))
        return
    with pytest.raises(PassError, match="the pass changed the interface"):
        run_pipeline(module, made(change))


def decoder(folder: Path, batch: str, seq: str, past: str, *, mask: bool = False) -> Path:
    """What optimum exports: caches that are joined, under names that our own decoders have too."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["emb", "input_ids"], ["e"]),
        helper.make_node("Gather", ["pos", "position_ids"], ["q"]),
        helper.make_node("Add", ["e", "q"], ["x"]),
        helper.make_node("Concat", ["past_key_values.0.key", "x"], ["present.0.key"], axis=1),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
    ]
    inputs = [typed(n, INT64, [batch, seq]) for n in ("input_ids", "position_ids")]
    inputs.append(typed("past_key_values.0.key", FLOAT, [batch, past, 16]))
    outputs = [typed("logits", FLOAT, [batch, seq, 40]), typed("present.0.key", FLOAT, [batch, f"{past} + {seq}", 16])]
    if mask:  # as long as what the cache holds after the run
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["m"], to=FLOAT),
            helper.make_node("Unsqueeze", ["m", "two"], ["wide"]),
            helper.make_node("Mul", ["present.0.key", "wide"], ["masked"]),
        ]
        inputs.append(typed("attention_mask", INT64, [batch, f"{past} + {seq}"]))
        outputs.append(typed("masked", FLOAT, None))
    sizes = {"emb": (40, 16), "pos": (64, 16), "head": (16, 40)}
    weights = [numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in sizes.items()]
    weights.append(numpy_helper.from_array(np.array([2]), "two"))
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    path = folder / "decoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "names",
    [("batch_size", "sequence_length", "past_sequence_length"), ("b", "s", "p"), ("batch_size", "seq_len", "ctx_len")],
)
def test_a_decoder_of_another_exporter_is_driven_by_its_own_inputs(
    names: tuple[str, str, str], mask: bool, tmp_path: Path
) -> None:
    path = decoder(tmp_path, *names, mask=mask)
    module = load_onnx(path)
    assert not is_decoder(module)
    plan = make_plan(module)
    feeds = plan.inputs
    assert not plan.runs
    assert set(feeds) == {v.name for v in module.graph.inputs}
    if mask:
        sizes = {name: feeds[name].shape[1] for name in feeds}
        assert sizes["attention_mask"] == sizes["past_key_values.0.key"] + sizes["input_ids"]
    session = optimized(path, 4)
    assert [v.name for v in session.get_inputs()] == list(feeds)
    shapes = [v.shape for v in session.get_outputs()]
    assert shapes[:2] == [[names[0], names[1], 40], [names[0], f"{names[2]} + {names[1]}", 16]]


def test_a_decoder_is_known_by_its_states() -> None:
    module = support.canonical("llama")
    assert is_decoder(module)
    module.residents = []
    assert not is_decoder(module)


def test_a_decoder_whose_dims_have_other_names_is_driven() -> None:
    module = support.canonical("llama")
    for old, new in (("batch_size", "rows"), ("seq_len", "tokens"), ("ctx_len", "slots")):
        module.rename_dim(old, new)
    module.specializations = []
    plan = make_plan(module)
    shapes = {run.positions.shape for run in plan.runs}
    assert len({rows for rows, _ in shapes}) == 1 and 1 in {tokens for _, tokens in shapes}


def test_formulas_that_would_take_for_ever_are_not_computed(tmp_path: Path) -> None:
    session = optimized(
        write(tmp_path, [PRODUCT], [typed("x", FLOAT, ["9**9**9**9", 8])], [typed("y", FLOAT, None)]), 4
    )
    assert session.get_inputs()[0].shape[1] == 8


def test_a_file_that_is_named_like_a_path_gives_a_plain_name(tmp_path: Path) -> None:
    path = write(tmp_path, [PRODUCT], [X], [Y])
    odd = path.rename(tmp_path / "..my model (1)é.onnx")
    module = load_onnx(odd)
    assert module.name == "my_model__1__"
    again = load_onnx(save_module(module, tmp_path / "out"))
    assert again.name == module.name


def test_what_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [PRODUCT], [X], [Y])
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelLoadError, match=r"foreign\.onnx is no ONNX file"):
        load_onnx(path)
