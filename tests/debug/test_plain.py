"""A plain ONNX file is a module without states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper

from qeff_ir.debug.plain import load_onnx, onnx_file
from qeff_ir.errors import ModelLoadError, PassError, QeffError
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.ir.snapshot import save_module
from qeff_ir.ir.verifier import verify
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support

from .models import plain, write_plain


def test_dims_come_from_the_interface_and_nameless_ones_get_a_name(tmp_path: Path) -> None:
    module = plain(tmp_path)
    verify(module)
    assert (module.name, module.states) == ("plain", ())
    assert list(module.dims) == ["rows", "x_dim_1", "y_dim_1"]
    assert WEIGHT_KEY in module.graph.initializers["w"].metadata_props


def test_a_saved_module_keeps_its_facts(tmp_path: Path) -> None:
    module = support.canonical("llama")
    save_module(module, tmp_path)
    path = onnx_file(str(tmp_path))
    assert path is not None and path == tmp_path / "model.onnx"
    assert load_onnx(path).facts() == module.facts()


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    assert onnx_file("some/model") is None
    with pytest.raises(ModelLoadError, match=r"^there is no file gone\.onnx$"):
        load_onnx(Path("gone.onnx"))
    path = tmp_path / "text.onnx"
    path.write_text("this is no protobuf")
    with pytest.raises(ModelLoadError, match=r"text\.onnx is no ONNX file \(\w+\)$"):
        load_onnx(path)
    assert write_plain(path).read_bytes()


def _changed(path: Path, change: Callable[[ModelProto], object]) -> Path:
    model = onnx.load(write_plain(path))
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def _numbers_cut_off(model: ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-3]


def _no_numbers(model: ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")


def _too_many_numbers(model: ModelProto) -> None:
    model.graph.initializer[0].raw_data += bytes(4)


def _no_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.UNDEFINED


def _inner_numbers(model: ModelProto) -> None:
    tensor = TensorProto(dims=[2], data_type=TensorProto.FLOAT, raw_data=b"123")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _attribute_without_a_type(model: ModelProto) -> None:
    model.graph.node[1].attribute.append(AttributeProto(name="odd"))


def _nothing_made(model: ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", ["lost"], []))


def _types_of_no_opset(model: ModelProto) -> None:
    model.graph.output[0].ClearField("type")
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("other", 1))


def _opset_of_no_number(model: ModelProto) -> None:
    model.opset_import[0].version = 1 << 62


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_numbers_cut_off, "the tensor 'w' of .* does not have the numbers of its sizes"),
        (_no_numbers, "the tensor 'w' of .* does not have the numbers of its sizes"),
        (_too_many_numbers, "the tensor 'w' of .* does not have the numbers of its sizes"),
        (_no_type, "the tensor 'w' of .*"),
        (_inner_numbers, "does not have the numbers of its sizes"),
        (_attribute_without_a_type, "the attribute 'odd' of a Relu in .* has no type"),
        (_nothing_made, "Relu without a result reads 'lost' before it is defined"),
        (_types_of_no_opset, "the types of the outputs cannot be told"),
        (_opset_of_no_number, "does not exist in opset 4611686018427387904"),
    ],
)
def test_a_file_that_is_no_sound_onnx_is_refused(
    change: Callable[[ModelProto], object], message: str, tmp_path: Path
) -> None:
    """Of numbers that are not there, an empty weight file was written."""
    with pytest.raises(QeffError, match=message):
        verify(load_onnx(_changed(tmp_path / "odd.onnx", change)))


def test_what_the_optimizer_cannot_take_is_told(tmp_path: Path) -> None:
    def call_a_function_of_another_opset(model: ModelProto) -> None:
        nodes = [helper.make_node("Relu", ["a"], ["b"])]
        function = helper.make_function("own", "Own", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
        model.functions.append(function)
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[1].op_type, model.graph.node[1].domain = "Own", "own"

    module = load_onnx(_changed(tmp_path / "odd.onnx", call_a_function_of_another_opset))
    with pytest.raises(PassError, match=r"^pass canonicalize: onnx_ir cannot inline a function of this graph"):
        run_pipeline(module, Pipeline.parse("canonicalize"))


@pytest.mark.parametrize("text", ["Relu", "plain_graph", "note", "rows"])
def test_a_string_that_is_not_utf_8_is_refused_wherever_it_stands(text: str, tmp_path: Path) -> None:
    """protobuf reads such a string as bytes: an operator, the graph's name, metadata and a dim here."""
    path = write_plain(tmp_path / "plain.onnx")
    model = onnx.load(path)
    model.graph.name = "plain_graph"
    model.graph.node[0].metadata_props.add(key="about", value="note")
    data = model.SerializeToString()
    assert text.encode() in data
    path.write_bytes(data.replace(text.encode(), b"\xe3" + text.encode()[1:]))
    with pytest.raises(QeffError, match=rf"plain.onnx has a string that is not UTF-8, '\\xe3{text[1:]}'"):
        load_onnx(path)
