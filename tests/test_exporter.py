"""The format ``ai100`` of transformers.exporters."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path

import pytest
import torch
from transformers.exporters import AutoHfExporter
from transformers.exporters.base import ExportedModel

from qeff_ir.errors import PackageError
from qeff_ir.exporter import Ai100Config, Ai100Exporter
from qeff_ir.testing import tolerance
from tests.encoders import build, example


@pytest.fixture(scope="module")
def exported() -> ExportedModel:
    config = Ai100Config(seq_len=[8, 16], batch_size=2)
    inputs = example("distilbert", dict.fromkeys(("input_ids", "attention_mask"), ("batch_size", "seq_len")))
    return AutoHfExporter.from_config(config).export(build("distilbert"), dict(inputs), config)


def test_it_returns_what_the_model_returns_also_after_saving(exported: ExportedModel, tmp_path: Path) -> None:
    exported.save_pretrained(tmp_path)
    inputs = example("distilbert", dict.fromkeys(("input_ids", "attention_mask"), ("batch_size", "seq_len")))
    with torch.no_grad():
        reference = copy.deepcopy(build("distilbert")).double()(**inputs)
    keep = inputs["attention_mask"] > 0
    for model in (exported, ExportedModel.from_pretrained(tmp_path)):
        outputs = model(**inputs)
        assert type(outputs) is type(reference)
        error = tolerance.error_over_rms(
            outputs.last_hidden_state[keep].numpy(), reference.last_hidden_state[keep].numpy()
        )
        assert error <= tolerance.bound(6)


def test_a_damaged_file_is_refused(exported: ExportedModel, tmp_path: Path) -> None:
    exported.save_pretrained(tmp_path)
    (tmp_path / "model.ai100.zip").write_bytes(b"no archive")
    with pytest.raises(PackageError, match=r"model\.ai100\.zip is not an exported package"):
        Ai100Exporter.load_program(tmp_path / "model.ai100.zip")
    for missing in (tmp_path / "none.zip", tmp_path):
        with pytest.raises(PackageError, match="there is no file"):
            Ai100Exporter.load_program(missing)


def test_what_is_no_package_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../../escaped.txt", "x")
    for _ in range(2):
        with pytest.raises(PackageError, match="is not an exported package"):
            Ai100Exporter.load_program(tmp_path / "evil.zip")
    assert [p.name for p in tmp_path.rglob("*.txt")] == []
    assert [p for p in (tmp_path / "home" / "exports").iterdir() if p.is_dir()] == []


def test_a_damaged_copy_in_the_cache_is_unpacked_again(
    exported: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    exported.save_pretrained(tmp_path)
    folder = Ai100Exporter.load_program(tmp_path / "model.ai100.zip")
    (model,) = folder.glob("*.onnx")
    content = model.read_bytes()
    model.write_bytes(content[:-1])
    assert Ai100Exporter.load_program(tmp_path / "model.ai100.zip") == folder
    assert model.read_bytes() == content


def test_another_device_is_refused(exported: ExportedModel) -> None:
    with pytest.raises(PackageError, match="takes its inputs from the CPU, not from cuda: leave device out"):
        exported.to("cuda")
