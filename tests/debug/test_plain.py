"""A plain ONNX file is a module without states."""

from __future__ import annotations

from pathlib import Path

import pytest

from qeff_ir.debug.plain import load_onnx, onnx_file
from qeff_ir.errors import ModelLoadError
from qeff_ir.module import WEIGHT_KEY
from qeff_ir.snapshot import save_module
from qeff_ir.verifier import verify
from tests import support

from .models import plain, write_plain


def test_dims_come_from_the_interface_and_nameless_ones_get_a_name(tmp_path: Path) -> None:
    module = plain(tmp_path)
    verify(module)
    assert (module.name, module.states) == ("plain", [])
    assert list(module.dims) == ["rows", "x_dim_1", "y_dim_1"]
    assert WEIGHT_KEY in module.graph.initializers["w"].metadata_props


def test_a_saved_module_keeps_its_facts(tmp_path: Path) -> None:
    module = support.canonical("llama")
    save_module(module, tmp_path)
    path = onnx_file(str(tmp_path))
    assert path == tmp_path / "model.onnx"
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
