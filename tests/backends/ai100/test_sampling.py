"""The package of a model that draws its tokens on the device, and damage to it, by the contract (§1.3)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from backends import find_backend
from backends.ai100 import contract
from backends.ai100.backend import BACKEND
from qeff_ir.errors import CompileError
from qeff_ir.passing import Pipeline, run_pipeline
from tests import support
from tests.backends.ai100.test_contract import (
    _io,  # pyright: ignore[reportPrivateUsage]
    _rename,  # pyright: ignore[reportPrivateUsage]
    _set_dim,  # pyright: ignore[reportPrivateUsage]
    _set_type,  # pyright: ignore[reportPrivateUsage]
    codes,
    edit_model,
)
from tests.models import VOCAB

TEXT = "sampling{pdfs=true top=16 guided=true}"
SEEN, ANSWERED = "past_repetition_penalty_buffer", "past_presence_penalty_buffer"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module, folder = support.canonical("llama"), tmp_path_factory.mktemp("drawing")
    run_pipeline(module, Pipeline.parse(support.rest_of("ai100")).add(TEXT))
    BACKEND.check(module, support.OPTIONS)
    BACKEND.emit(module, folder, support.OPTIONS)
    return folder


@pytest.fixture
def drawing(emitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(emitted, tmp_path / "drawing"))


def test_the_package_is_as_the_contract_spells_it(drawing: Path) -> None:
    model = onnx.load(str(drawing / "LlamaForCausalLM.onnx"), load_external_data=False)
    states = [f"past_{part}.{layer}" for layer in range(2) for part in ("key", "value")]
    given = {
        "last_accepted_output_tokens": (TensorProto.INT64, ["batch_size", "seq_len"]),
        SEEN: (TensorProto.BOOL, ["batch_size", VOCAB]),
        "repetition_penalties": (TensorProto.FLOAT, ["batch_size", 1]),
        ANSWERED: (TensorProto.BOOL, ["batch_size", VOCAB]),
        "presence_penalties": (TensorProto.FLOAT, ["batch_size", 1]),
        "temperatures": (TensorProto.FLOAT, ["batch_size", 1]),
        "top_ks": (TensorProto.INT32, ["batch_size", 1]),
        "top_ps": (TensorProto.FLOAT, ["batch_size", 1]),
        "min_ps": (TensorProto.FLOAT, ["batch_size", 1]),
        "random_numbers": (TensorProto.FLOAT, ["batch_size", 16]),
        "token_bitmasks": (TensorProto.BOOL, ["batch_size", VOCAB]),
    }
    made = {
        "probs": (TensorProto.FLOAT, ["batch_size", 1, VOCAB]),
        "next_tokens": (TensorProto.INT64, ["batch_size", 1, 1]),
    }
    assert [v.name for v in model.graph.input] == ["input_ids", "position_ids", *states, *given]
    kept = [f"{name}_RetainedState" for name in (*states, SEEN, ANSWERED)]
    assert [v.name for v in model.graph.output] == [*made, *kept]
    for name, (kind, dims) in (given | made).items():
        tensor = _io(model, name).type.tensor_type
        assert tensor.elem_type == kind
        assert [d.dim_param or d.dim_value for d in tensor.shape.dim] == dims
    listed = (drawing / "custom_io.yaml").read_text()
    assert all(name in listed for name in states)
    assert "penalty" not in listed and "token" not in listed  # tables are of bits, and no caches
    scatters = [node for node in model.graph.node if node.op_type == "CtxScatterCB3D"]
    assert len(scatters) == 2 and all(node.domain == "com.qualcomm.cloud" for node in scatters)
    assert list(contract.violations(drawing)) == []


def _swap(one: str, other: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for values in (model.graph.input, model.graph.output):
            first, second = (next((v for v in values if v.name == name), None) for name in (one, other))
            if first is not None and second is not None:
                kept = onnx.ValueInfoProto()
                kept.CopyFrom(first)
                first.CopyFrom(second)
                second.CopyFrom(kept)

    return change


def _fix(name: str, axis: int, size: int) -> Callable[[onnx.ModelProto], None]:
    return lambda m: setattr(_io(m, name).type.tensor_type.shape.dim[axis], "dim_value", size)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: _rename(m, "top_ks", "top_k"), {"inputs", "state-pair"}),
        (lambda m: _rename(m, "last_accepted_output_tokens", "accepted"), {"inputs", "state-pair"}),
        (lambda m: _rename(m, "next_tokens", "tokens"), {"inputs", "outputs"}),
        (lambda m: _rename(m, f"{SEEN}_RetainedState", "seen"), {"state-pair", "outputs"}),
        (lambda m: _rename(m, "probs", "logits"), {"outputs"}),
        (_swap("temperatures", "top_ps"), {"inputs"}),
        (_swap("probs", "next_tokens"), {"outputs"}),
        (_swap(SEEN, ANSWERED), {"inputs"}),
        (_swap(f"{SEEN}_RetainedState", f"{ANSWERED}_RetainedState"), {"outputs"}),
        (_set_type("top_ks", TensorProto.INT64), {"dtype-shape"}),
        (_set_type("random_numbers", TensorProto.FLOAT16), {"dtype-shape"}),
        (_set_type("next_tokens", TensorProto.INT32), {"dtype-shape"}),
        (_set_type(SEEN, TensorProto.UINT8), {"dtype-shape", "state-pair"}),
        (_set_dim(ANSWERED, 0, "full_batch_size"), {"dtype-shape", "state-pair", "symbol"}),
        (_fix("random_numbers", 1, VOCAB + 1), {"dtype-shape"}),
        (_fix("token_bitmasks", 1, 16), {"dtype-shape"}),
        (_fix("probs", 2, 16), {"dtype-shape"}),
        (_fix("temperatures", 1, 2), {"dtype-shape"}),
    ],
)
def test_damage_is_found(drawing: Path, change: Callable[[onnx.ModelProto], None], expected: set[str]) -> None:
    edit_model(drawing, change)
    assert codes(drawing) >= expected


def test_tables_in_the_list_of_caches_are_found(drawing: Path) -> None:
    with (drawing / "custom_io.yaml").open("a") as file:
        file.write(f" - IOName: {SEEN}\n   Precision: float16\n\n")
    assert codes(drawing) == {"custom-io"}


def test_inputs_in_another_order_are_refused_before_they_are_written() -> None:
    module = support.canonical("llama")
    run_pipeline(module, Pipeline.parse(support.rest_of("ai100")).add(TEXT))
    inputs = module.graph.inputs
    inputs.append(inputs.pop(inputs.index(module.input("temperatures"))))
    with pytest.raises(CompileError, match="the inputs must be input_ids"):
        find_backend("ai100").check(module, support.OPTIONS)


def test_entries_out_of_range_are_not_written(tmp_path: Path) -> None:
    """The device's rule of `CtxScatterCB3D`, on tables of bits and of numbers."""
    import onnxruntime as ort
    from onnx import helper

    from backends.ai100 import row_rules

    rule = row_rules.CtxScatterCB3D.to_function_proto()
    node = helper.make_node("CtxScatterCB3D", ["d", "r", "p", "u"], ["o"], domain=rule.domain)
    rows, at = np.array([[2], [-1], [0]]), np.array([[1, 2**31 - 1], [0, 1], [3, -1]])
    for kind, dtype, tail in ((TensorProto.BOOL, np.bool_, ()), (TensorProto.FLOAT, np.float32, (2,))):
        table, updates = np.zeros((3, 4, *tail), dtype), np.ones((3, 2, *tail), dtype)
        io = [("d", kind, table), ("r", TensorProto.INT64, rows), ("p", TensorProto.INT64, at), ("u", kind, updates)]
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info(name, k, array.shape) for name, k, array in io],
            [helper.make_tensor_value_info("o", kind, table.shape)],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(rule.domain, 1)]
        model = helper.make_model(graph, functions=[rule], opset_imports=opsets, ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {name: array for name, _, array in io})
        expected = np.zeros_like(table)
        expected[2, 1] = expected[0, 3] = 1
        np.testing.assert_array_equal(out, expected)
