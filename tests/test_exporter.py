"""The format ``ai100`` of transformers.exporters."""

from __future__ import annotations

import copy
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.exporters import AutoHfExporter  # pyright: ignore[reportPrivateImportUsage]
from transformers.exporters.base import ExportedModel

from qeff_ir import numerics
from qeff_ir.errors import PackageError
from qeff_ir.exporter import Ai100Config, Ai100Exporter
from tests.encoders import build, example


@pytest.fixture(scope="module")
def exported() -> ExportedModel:
    config = Ai100Config(seq_len=[8, 16], batch_size=2)
    inputs = example("distilbert", dict.fromkeys(("input_ids", "attention_mask"), ("batch_size", "seq_len")))
    return AutoHfExporter.from_config(config).export(build("distilbert"), dict(inputs), config)


def test_it_returns_what_the_model_returns_also_after_saving(exported: ExportedModel, tmp_path: Path) -> None:
    exported.save_pretrained(tmp_path)
    inputs: dict[str, Any] = example(
        "distilbert", dict.fromkeys(("input_ids", "attention_mask"), ("batch_size", "seq_len"))
    )
    with torch.no_grad():
        reference = copy.deepcopy(build("distilbert")).double()(**inputs)
    keep = inputs["attention_mask"] > 0
    for model in (exported, ExportedModel.from_pretrained(tmp_path)):
        outputs = model(**inputs)
        assert type(outputs) is type(reference)
        error = numerics.error_over_rms(
            outputs.last_hidden_state[keep].numpy(), reference.last_hidden_state[keep].numpy()
        )
        assert error <= numerics.bound(6)


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


@pytest.fixture
def archive(exported: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    exported.save_pretrained(tmp_path)
    return tmp_path / "model.ai100.zip"


def rewritten(archive: Path, **changes: Any) -> None:
    """The archive again, its members with other marks."""
    with zipfile.ZipFile(archive) as old:
        contents = {item.filename: old.read(item) for item in old.infolist()}
    with zipfile.ZipFile(archive, "w", changes.pop("compress", zipfile.ZIP_STORED)) as new:
        for name, content in contents.items():
            item = zipfile.ZipInfo(name)
            item.compress_type = new.compression
            for key, value in changes.items():
                setattr(item, key, value)
            new.writestr(item, content)


def flagged(archive: Path, offset: int, value: int) -> None:
    """Other bytes in the headers of all members, at the offset that they have in the central directory."""
    data = bytearray(archive.read_bytes())
    for mark, shift in ((b"PK\x01\x02", 0), (b"PK\x03\x04", -2)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset + shift] = value
            at = data.find(mark, at + 4)
    archive.write_bytes(bytes(data))


def bomb(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as new:
        new.writestr("big.txt", bytes(64 << 20))


def damaged(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 0xFF
    archive.write_bytes(bytes(data))


def added(*names: str) -> Callable[[Path], None]:
    def change(archive: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(archive, "a") as new:
            warnings.simplefilter("ignore")  # of names that are there twice
            for name in names:
                new.writestr(name, "x")

    return change


ARCHIVES: dict[str, Callable[[Path], object]] = {
    "encrypted": lambda archive: flagged(archive, 8, 0x1),
    "of an unknown method": lambda archive: flagged(archive, 10, 99),
    "deflated": lambda archive: rewritten(archive, compress=zipfile.ZIP_DEFLATED),
    "a bomb": bomb,
    "damaged": damaged,
    "cut": lambda archive: archive.write_bytes(archive.read_bytes()[:-100]),
    "with a link": lambda archive: rewritten(archive, external_attr=0o120777 << 16),
    "with a name outside": added("../evil.txt"),
    "with an absolute name": added("/tmp/evil.txt"),
    "with a name of another system": added("..\\evil.txt"),
    "with a file below a file": added("package.json/evil.txt"),
    "with a file twice": added("package.json"),
    "with a name that is none": added("a//b"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_is_not_ours_is_refused_in_one_sentence(case: str, archive: Path) -> None:
    assert Ai100Exporter.load_program(archive).is_dir()
    ARCHIVES[case](archive)
    before = {p for p in archive.parent.rglob("*") if not p.name.startswith(".")}
    with pytest.raises(PackageError, match=r"model\.ai100\.zip is not an exported package \(.+\): export") as error:
        Ai100Exporter.load_program(archive)
    assert "\n" not in str(error.value)
    assert {p for p in archive.parent.rglob("*") if not p.name.startswith(".")} == before


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
