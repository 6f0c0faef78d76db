"""What a builder infers of new nodes: as ONNX does it, unless the author says otherwise."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qeff_ir.ir.dialect import DOMAIN
from qeff_ir.ir.module import Module
from qeff_ir.ir.printer import type_text
from qeff_ir.passing import OpBuilder, Pipeline, Rewriter, run_pipeline
from tests import support


@pytest.fixture
def module() -> Module:
    return support.canonical("llama")


@pytest.fixture
def b(module: Module) -> OpBuilder:
    return Rewriter(module, "made").at(next(iter(module.graph)))


def test_types_and_shapes_are_inferred(module: Module, b: OpBuilder) -> None:
    ids, past = module.input("input_ids"), module.input("past_key.0")
    new = b("Slice", past, b.const([0]), b.const([1]), b.const([2]))
    made = {
        "int64[batch_size, seq_len, 1]": b("Unsqueeze", ids, b.const([2])),
        "float[batch_size, seq_len]": b("Cast", ids, to=ir.DataType.FLOAT),
        "int64[2]": b("Shape", ids),
        "bool[batch_size, seq_len]": b("Less", ids, b.const(0)),
        "float[batch_size, 2, 4, 2]": b("Reshape", b("Expand", new, b.const([1, 2, 1, 8])), b.const([0, 2, 4, 2])),
        "float[?, ?, ?, ?]": b("CacheUpdate", past, new, ids, domain=DOMAIN),
        "?[?]": b("NoSuchOperator", ids, domain="com.microsoft"),
    }
    shown = {text: type_text(value) for text, value in made.items()}
    assert shown == {text: text for text in made}
    first, second = b.several("Split", past, b.const([3, 5]), axis=3, shapes=[None, None])
    assert [type_text(v) for v in (first, second)] == [f"float[batch_size, 2, ctx_len, {n}]" for n in (3, 5)]


def test_what_differs_is_inferred_anew(module: Module, b: OpBuilder) -> None:
    """Numbers of constants, attributes, and sizes of inputs are a part of what is asked."""
    past = module.input("past_key.0")
    shapes = [
        type_text(b("Reshape", past, b.const([0, 16, -1]))),
        type_text(b("Reshape", past, b.const([0, 8, -1]))),
        type_text(b("Transpose", past, perm=[1, 0, 2, 3])),
        type_text(b("Transpose", past, perm=[3, 1, 2, 0])),
        type_text(b("Neg", past)),
        type_text(b("Neg", module.input("input_ids"))),
        type_text(b("Concat", past, past, axis=3)),
    ]
    assert len(set(shapes)) == len(shapes)


def test_what_the_author_gives_stays(module: Module, b: OpBuilder) -> None:
    ids = module.input("input_ids")
    told = b("Unsqueeze", ids, b.const([2]), shape=["rows", "seq_len", 1])
    assert type_text(told) == "int64[rows, seq_len, 1]"
    assert type_text(b("NoSuchOperator", ids, domain="x", dtype=ir.DataType.FLOAT)) == "float[?]"
    assert type_text(b("NoSuchOperator", ids, domain="x", shape=[3])) == "?[3]"
    again = b("Unsqueeze", ids, b.const([2]))
    assert again.shape is not None
    again.shape[0] = 7  # of its own
    assert type_text(b("Unsqueeze", ids, b.const([2]))) == "int64[batch_size, seq_len, 1]"


def test_sizes_that_stay_open_are_those_of_what_is_replaced(module: Module) -> None:
    rewriter = Rewriter(module, "made")
    node = next(n for n in module.graph if n.op_type == "Sigmoid")
    before = type_text(node.outputs[0])
    flat = rewriter.at(node)("Reshape", rewriter.at(node)("Sigmoid", node.inputs[0]), rewriter.constant(np.array([-1])))
    assert "?" in type_text(flat)
    back = rewriter.at(node)("Reshape", flat, rewriter.constant(np.array([2, -1, 64])))
    assert type_text(back) == "float[2, ?, 64]"
    rewriter.replace(node, back)
    assert before == "float[batch_size, seq_len, 64]" and type_text(back) == "float[2, seq_len, 64]"


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "falcon-h1"])
def test_nothing_is_left_open_after_a_stock_pipeline(name: str, target: str) -> None:
    module = support.canonical(name)
    run_pipeline(module, Pipeline.parse(support.rest_of(target)), check=2)
    values = [value for node in module.graph for value in node.outputs]
    assert len(values) > 50 and [type_text(v) for v in values if v.dtype is None or v.shape is None] == []
