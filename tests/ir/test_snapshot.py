"""A module that was saved and loaded is the same module, to the last name and digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qeff_ir.errors import VerificationError
from qeff_ir.ir.module import METADATA_KEY, WEIGHT_KEY
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.ir.verifier import verify
from tests import support


@pytest.mark.parametrize("name", ["mistral", "gpt-oss"])
def test_saving_and_loading_is_exact(name: str, tmp_path: Path) -> None:
    module = support.canonical(name)
    again = load_module(save_module(module, tmp_path))
    assert to_text(again) == to_text(module)
    assert again.facts() == module.facts()
    weights = {n: v for n, v in module.graph.initializers.items() if WEIGHT_KEY in v.metadata_props}
    assert weights
    for key, value in weights.items():
        copy = again.graph.initializers[key].const_value
        assert value.const_value is not None
        assert copy is not None
        np.testing.assert_array_equal(copy.numpy(), value.const_value.numpy())
    verify(again)


def test_a_snapshot_loads_in_onnx_runtime_between_any_two_passes(tmp_path: Path) -> None:
    seen: list[str] = []
    for target in ("onnxruntime", "ai100"):
        module = support.canonical("gpt-oss")
        for step in support.rest_of(target).split(","):
            support.apply(module, step)
            path = save_module(module, tmp_path / f"{target}-{len(seen)}")
            session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
            assert [i.name for i in session.get_inputs()] == [v.name for v in module.graph.inputs]
            seen.append(step)
    assert len(seen) > 10


def test_a_plain_onnx_file_is_no_module(tmp_path: Path) -> None:
    module = support.canonical("llama")
    path = save_module(module, tmp_path)
    text = path.read_bytes().replace(METADATA_KEY.encode(), b"qeff.nodule")
    path.write_bytes(text)
    with pytest.raises(VerificationError, match=r"^\[facts\] the ONNX model has no 'qeff.module' metadata"):
        load_module(path)
