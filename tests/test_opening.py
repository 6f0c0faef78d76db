"""What opens is what was checked; whatever is wrong with a package is one sentence, on both targets."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from qeff_ir.auto.causal_lm import QEFFAutoModelForCausalLM
from qeff_ir.cli.app import main
from qeff_ir.compiler import compile_model
from qeff_ir.errors import PackageError, QeffError
from qeff_ir.frontend.checkpoint.references import read_header
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.source import Source, open_source
from qeff_ir.ir.module import METADATA_KEY, Module
from qeff_ir.package import MANIFEST, SIDE_FOLDER, is_package, open_package
from qeff_ir.ranges import file_range, numbers_digest
from qeff_ir.runtime.token_table import TokenTable
from tests import support

TARGETS = ["onnxruntime", "ai100"]


class Lowered(Source):
    """A model folder, lowered in no time; `meanwhile` happens then."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, folder: Path) -> None:
        super().__init__(Folder(folder))

    def lower(self) -> Module:
        self.meanwhile()
        return _lowered(self).clone()


def _lowered(source: Source, known: dict[str, Module] = {}) -> Module:  # noqa: B006
    """The module of the one model here; its weights are those of the folder that was lowered first."""
    if not known:
        known["llama"] = Source.lower(source)
    return known["llama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    support.tiny("llama")[1].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packages")
    for target in TARGETS:
        compile_model(Lowered(folder), support.OPTIONS, target=target, out=root / target, emit_only=target == "ai100")
    host: dict[str, Any] = {"target": "onnxruntime", "token_embedding": "host"}
    compile_model(Lowered(folder), support.OPTIONS, out=root / "host", **host)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def package(request: pytest.FixtureRequest, packages: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(packages[request.param], tmp_path / "package")


def reseal(package: Path) -> None:
    """Make the manifest fit the files."""
    data = json.loads((package / MANIFEST).read_text())
    for name, record in data["files"].items():
        content = (package / name).read_bytes()
        record.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (package / MANIFEST).write_text(json.dumps(data))


def onnx_of(package: Path) -> Path:
    (path,) = package.glob("*.onnx")
    return path


def edited(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    def edit(package: Path) -> None:
        proto = onnx.load(onnx_of(package), load_external_data=False)
        change(proto)
        onnx_of(package).write_bytes(proto.SerializeToString())

    return edit


def facts(text: str) -> Callable[[Path], object]:
    def change(proto: onnx.ModelProto) -> None:
        next(p for p in proto.metadata_props if p.key == METADATA_KEY).value = text

    return edited(change)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no bytes": lambda p: onnx_of(p).write_bytes(b""),
    "half of it": lambda p: onnx_of(p).write_bytes(onnx_of(p).read_bytes()[:999]),
    "other bytes": lambda p: onnx_of(p).write_bytes(os.urandom(100)),
    "a cycle": edited(lambda m: m.graph.node[0].input.__setitem__(0, m.graph.node[-1].output[0])),
    "no graph": edited(lambda m: m.ClearField("graph")),
    "no inputs": edited(lambda m: m.graph.ClearField("input")),
    "facts that are no JSON": facts("{"),
    "facts that are a list": facts("[]"),
    "deep facts": facts("[" * 5000),
    "facts of other types": facts('{"version": 1, "name": 5, "states": 7, "dims": "x", "specializations": null}'),
    "a tensor of no type": edited(lambda m: setattr(m.graph.initializer[0], "data_type", 99)),
    "a negative offset": edited(lambda m: [setattr(e, "value", "-5") for e in external(m) if e.key == "offset"]),
    "an offset that is no number": edited(
        lambda m: [setattr(e, "value", "x") for e in external(m) if e.key == "offset"]
    ),
}


def external(proto: onnx.ModelProto) -> list[onnx.StringStringEntryProto]:
    found = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
    assert found
    return found


@pytest.mark.parametrize("name", ["onnxruntime", "ai100", "host"])
def test_a_package_is_read_by_every_tool_of_onnx(name: str, packages: dict[str, Path]) -> None:
    path = onnx_of(packages[name])
    whole = onnx.load(path)
    assert sum(len(t.raw_data) for t in whole.graph.initializer) > 50_000
    assert len(gs.import_onnx(whole).nodes) == len(whole.graph.node)
    tensors = [v.const_value for v in ir.load(path).graph.initializers.values()]
    assert all(t is not None and np.isfinite(t.numpy()).all() for t in tensors)


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("package", TARGETS, indirect=True)
def test_a_damaged_graph_behind_a_fitting_manifest_is_told(
    name: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[name](package)
    reseal(package)
    open_package(package)
    with pytest.raises(QeffError):
        QEFFAutoModelForCausalLM.from_package(package).runner(threads=1)
    assert main(["cost", str(package)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "[5]", '{"specializations": [{"batch_size": "x"}]}'])
@pytest.mark.parametrize("package", ["ai100"], indirect=True)
def test_damaged_specializations_are_told(text: str, package: Path) -> None:
    (package / "specializations.json").write_text(text)
    reseal(package)
    with pytest.raises(PackageError):
        QEFFAutoModelForCausalLM.from_package(package).runner(threads=1)


@pytest.mark.parametrize("package", TARGETS, indirect=True)
def test_weights_that_change_between_opening_and_first_use_are_told(package: Path) -> None:
    model = QEFFAutoModelForCausalLM.from_package(package)
    weights = package / "weights" / "model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(PackageError, match=r"weights/model\.safetensors of the package .* was altered"):
        model.runner(threads=1)


def test_a_package_that_is_replaced_between_opening_and_first_use_is_told(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(packages["onnxruntime"], tmp_path / "package")
    model = QEFFAutoModelForCausalLM.from_package(tmp_path / "package")
    shutil.rmtree(tmp_path / "package")
    with pytest.raises(PackageError, match="is not a qeff package"):
        model.runner()
    shutil.copytree(packages["ai100"], tmp_path / "package")
    with pytest.raises(PackageError, match="was replaced by another package since it was opened: open it again"):
        model.runner()


@pytest.mark.parametrize("package", ["onnxruntime"], indirect=True)
def test_a_side_file_that_is_not_listed_does_not_change_the_answer(package: Path) -> None:
    (package / SIDE_FOLDER / "added_tokens.json").write_text('{"x": 5}')
    with pytest.raises(PackageError, match=r"huggingface/added_tokens\.json of the package .* is not in its manifest"):
        QEFFAutoModelForCausalLM.from_package(package)


def other_checkpoint(folder: Path, path: Path, name: str = "model.embed_tokens.weight") -> Path:
    """The model with other numbers in one tensor."""
    shutil.copytree(folder, path)
    fine_tune(path, name)
    return path


def fine_tune(folder: Path, name: str = "model.embed_tokens.weight") -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].clone()
    weights[name][-1, -1] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("package", ["host"], indirect=True)
def test_a_package_takes_only_the_table_that_it_was_compiled_with(package: Path, folder: Path, tmp_path: Path) -> None:
    def runner(checkpoint: Path) -> Any:
        return QEFFAutoModelForCausalLM.from_package(package, checkpoint=checkpoint).runner(threads=1)

    same = shutil.copytree(folder, tmp_path / "same")
    expected = runner(folder).decoder.prefill(support.PROMPTS)
    np.testing.assert_array_equal(runner(same).decoder.prefill(support.PROMPTS), expected)
    other = "model.layers.0.mlp.up_proj.weight"  # is not looked up, and may be another one
    np.testing.assert_array_equal(
        runner(other_checkpoint(folder, tmp_path / "head", other)).decoder.prefill(support.PROMPTS), expected
    )
    text = "has other numbers than the one that .* was compiled with: give the model that the package was made from"
    with pytest.raises(PackageError, match=text):
        runner(other_checkpoint(folder, tmp_path / "other"))
    fine_tune(same)
    with pytest.raises(PackageError, match=text):
        runner(same)


def test_a_table_is_known_whatever_it_is_stored_as(tmp_path: Path) -> None:
    numbers = torch.randn(50, 8).bfloat16()
    digests: set[str] = set()
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        save_file({"before": torch.zeros(3), "t": numbers.to(dtype)}, path)
        tensor = read_header(path)["t"].tensor("t")
        digests |= {numbers_digest(tensor)}
    digests.add(hashlib.sha256(numbers.float().numpy().tobytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("harm", ["rewritten", "shorter", "gone"])
def test_a_table_that_changes_under_an_open_model_is_told(harm: str, tmp_path: Path) -> None:
    """Truncated, mapped memory would end the process with SIGBUS."""
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.arange(4096.0).reshape(1024, 4)}, path)
    table, ids = TokenTable(read_header(path)["t"].tensor("t")), np.array([[1023]])
    assert table.vectors(ids).tolist() == [[[4092.0, 4093.0, 4094.0, 4095.0]]]
    os.link(path, tmp_path / "another")  # as other packages do
    table.vectors(ids)
    if harm == "rewritten":
        data = path.read_bytes()
        path.write_bytes(bytes(len(data)))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif harm == "shorter":
        os.truncate(path, 100)
    else:
        path.unlink()
    with pytest.raises(
        PackageError, match=r"model\.safetensors was changed since the model was opened: open the model"
    ):
        table.vectors(ids)


@pytest.mark.parametrize("gone", [False, True])
def test_a_checkpoint_that_changes_while_it_is_compiled_makes_no_package(
    gone: bool, folder: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    source = Lowered(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    data = path.read_bytes()
    source.meanwhile = path.unlink if gone else lambda: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(QeffError, match=r"model\.safetensors was changed|model\.safetensors cannot be read"):
        compile_model(source, support.OPTIONS, target="onnxruntime", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_kill_left_is_removed_when_the_package_is_found(
    folder: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(packages["onnxruntime"], tmp_path / "out")
    for end in ("old", "0badcafe"):
        shutil.copytree(out, tmp_path / f".out.partial-{end}")
    (tmp_path / ".out.lock").touch()
    assert compile_model(Lowered(folder), support.OPTIONS, target="onnxruntime", out=out).cached
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_is_put_back_when_the_package_is_wanted(
    folder: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(packages["onnxruntime"], tmp_path / ".out.partial-old")
    assert compile_model(Lowered(folder), support.OPTIONS, target="onnxruntime", out=tmp_path / "out").cached
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["/nowhere", "/proc"])
def test_no_room_for_temporary_files_is_told(place: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    source = Lowered(folder)
    monkeypatch.setattr("tempfile.tempdir", place)
    with pytest.raises(PackageError, match=r"cannot be (written|read)"):
        compile_model(source, support.OPTIONS, target="onnxruntime", out=tmp_path / "out")


def test_a_package_in_the_cache_is_checked_once_on_a_machine(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_package(packages["ai100"])
    monkeypatch.setattr("qeff_ir.digests._read", lambda *_: pytest.fail("it is read again"))
    assert is_package(packages["ai100"])
    open_package(packages["ai100"])


def test_a_linked_checkpoint_that_is_rewritten_in_place_is_told(
    folder: Path, packages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the size and the time that it had; clones and copies do not change with it at all."""
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    for choice, linked in (("copy", False), ("link", True)):
        monkeypatch.setenv("QEFF_WEIGHTS", choice)
        source, out = open_source(tmp_path / "model"), tmp_path / choice
        source.lower = lambda: moved(weights)
        compile_model(source, support.OPTIONS, target="onnxruntime", out=out)
        assert (out / "weights" / weights.name).samefile(weights) == linked
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    open_package(tmp_path / "copy")
    with pytest.raises(PackageError, match=r"weights/model\.safetensors of the package .* was altered"):
        open_package(tmp_path / "link")


def moved(file: Path) -> Module:
    """The lowered model with its weights in another copy of the file."""
    module = _lowered(open_source(file.parent)).clone()
    for value in module.graph.initializers.values():
        where = file_range(value.const_value)
        if where is not None:
            value.const_value = dataclasses.replace(where, file=file).tensor(value.name or "")
    return module


class Opens:
    """Counts how often a file is opened, by whatever library: the kernel tells (inotify)."""

    _OPEN, _CLOSE = 0x20, 0x10

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(os.O_NONBLOCK)
        # Equal events that follow one another become one, so that what closes the file is watched too.
        assert self._handle >= 0
        assert libc.inotify_add_watch(self._handle, os.fsencode(path), self._OPEN | self._CLOSE) >= 0

    def count(self) -> int:
        """How often since the last call."""
        try:
            data = os.read(self._handle, 1 << 16)
        except BlockingIOError:
            return 0
        assert len(data) % 16 == 0  # a watched file has no name in its events
        return sum(mask == self._OPEN for _, mask, _, _ in struct.iter_unpack("iIII", data))


@pytest.mark.parametrize("target", TARGETS)
def test_a_package_is_opened_with_one_load_of_its_onnx_file(target: str, packages: dict[str, Path]) -> None:
    package = packages[target]
    open_package(package)  # its digests are known on this machine from here on
    opens = Opens(onnx_of(package))
    for _ in range(2):
        onnx_of(package).read_bytes()
    assert opens.count() == 2
    model = QEFFAutoModelForCausalLM.from_package(package)
    assert opens.count() == 0
    decoder = model.runner(threads=1).decoder
    assert opens.count() == 1
    assert np.ptp(decoder.prefill(support.PROMPTS)) > 0
    assert opens.count() == 0
