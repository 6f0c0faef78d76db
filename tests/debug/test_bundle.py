"""A bundle is whole or not there, says all, and is data only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from passes.merge_lora import MergeLora
from qeff_ir.adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from qeff_ir.debug.bisect import bisect
from qeff_ir.debug.bundle import METADATA, SCHEMA_VERSION, read_bundle, read_trace, write_bundle
from qeff_ir.debug.capture import Capture, default_folder
from qeff_ir.debug.plain import load_onnx
from qeff_ir.debug.reduce import reduce
from qeff_ir.debug.replay import replay
from qeff_ir.errors import BundleError, QeffError, VerificationError
from qeff_ir.ir.printer import to_text
from qeff_ir.ir.snapshot import save_module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support
from tests.adapters.random_adapters import base, make

from .test_bisect import FUSIONS, fail
from .wrong_passes import BreaksFacts, FlippedSign


def test_a_bundle_says_what_failed_and_holds_what_it_takes(tmp_path: Path) -> None:
    bundle = fail("fuse-norms,breaks-facts,fuse-activations", tmp_path / "bundle", 1)
    data = bundle.metadata
    assert (data.pass_id, data.suffix, data.check) == ("breaks-facts", "breaks-facts,fuse-activations", 1)
    assert (data.error, data.code) == ("VerificationError", "state-pair")
    assert data.message.startswith("pass breaks-facts: [state-pair] graph output 'past_key.0_RetainedState'")
    assert data.versions["onnx"] == onnx.__version__
    assert json.loads((tmp_path / "bundle" / METADATA).read_text())["version"] == SCHEMA_VERSION
    assert to_text(bundle.start) == to_text(support.canonical("llama"))
    expected = support.canonical("llama")
    support.apply(expected, "fuse-norms")
    assert to_text(bundle.module) == to_text(expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_the_trace_is_a_backend_test_of_onnx(tmp_path: Path) -> None:
    bundle = fail("breaks-facts", tmp_path / "bundle", 1)
    inputs, outputs = read_trace(bundle.folder)
    names = [v.name or "" for v in bundle.module.graph.inputs]
    first = onnx.load_tensor(str(bundle.folder / "test_data_set_0" / "input_0.pb"))
    assert first.name in names
    fed = {onnx.load_tensor(str(p)).name: onnx.numpy_helper.to_array(onnx.load_tensor(str(p)))
           for p in (bundle.folder / "test_data_set_0").glob("input_*.pb")}  # fmt: skip
    assert set(fed) == set(names)
    assert len(inputs) == len(names)
    got = support.run_graph(bundle.module, tmp_path / "run", fed)
    for value, expected in zip(bundle.module.graph.outputs, outputs, strict=True):
        np.testing.assert_allclose(got[value.name or ""], expected, rtol=1e-5, atol=1e-6)


def test_replay_tells_same_other_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fail(f"{FUSIONS},flipped-sign", tmp_path / "bundle", 4)
    same, what = replay(bundle)
    assert same
    assert what.startswith("it fails in the same way: pass flipped-sign: [equivalence] it changed behavior: 'logits'")
    monkeypatch.setattr(FlippedSign, "run", BreaksFacts.run)
    same, what = replay(bundle)
    assert not same
    assert what.startswith(
        "it fails in another way: VerificationError [state-pair] instead of EquivalenceError [equivalence]: "
    )
    monkeypatch.setattr(FlippedSign, "run", lambda *_: None)
    assert replay(bundle) == (False, "it does not fail any more: flipped-sign runs without an error")


def test_nothing_is_written_when_nothing_fails_or_the_user_interrupts(tmp_path: Path) -> None:
    module, capture = support.canonical("llama"), Capture(tmp_path / "bundle")
    run_pipeline(module, Pipeline.parse("fuse-norms"), instruments=[capture])
    capture.failed("fuse-norms", Pipeline.parse("fuse-norms").passes[0], module, KeyboardInterrupt())
    assert capture.written is None
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_a_new_one_in_the_cache() -> None:
    first = default_folder("Model", "attention#2")
    assert first.parts[-2:] == ("bundles", "Model-attention.2-1")
    first.mkdir(parents=True)
    assert default_folder("Model", "attention#2").name == "Model-attention.2-2"


def test_an_older_bundle_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    bundle = fail("breaks-facts", tmp_path / "bundle", 1)
    fail("raises", tmp_path / "bundle", 1)
    assert read_bundle(tmp_path / "bundle").metadata.pass_id == "raises"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match=r"taken exists and is no bundle: remove it, or choose another --bundle$"):
        write_bundle(taken, bundle.metadata, bundle.module, bundle.start, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"file/deep cannot be written \(Not a directory\): choose another --bundle$"):
        write_bundle(tmp_path / "file" / "deep", bundle.metadata, bundle.module, bundle.start, None)
    assert (taken / "thesis.txt").read_text() == "years of work"


def test_a_bundle_is_replaced_by_a_finished_one_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fail("breaks-facts", tmp_path / "bundle", 1)
    assert fail("fuse-norms,breaks-facts", tmp_path / "bundle", 1).metadata.pipeline == "fuse-norms,breaks-facts"
    fail("breaks-facts", tmp_path / "bundle", 1)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not self.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleError, match=r"bundle cannot be written \(No space left on device\)"):
        write_bundle(tmp_path / "bundle", first.metadata, first.module, first.start, None)
    assert read_bundle(tmp_path / "bundle").metadata == first.metadata
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_damaged_and_foreign_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"is not a bundle \(it has no metadata.json\): 'qeff opt --bundle DIR' writes"
    ):
        read_bundle(tmp_path)
    folder = fail("breaks-facts", tmp_path / "bundle", 1).folder
    path = folder / METADATA
    good = json.loads(path.read_text())
    for change, message in (
        ({"version": 99}, r"bundle has schema version 99, this qeff-ir reads 1$"),
        ({"version": 0}, r"bundle has schema version 0, this qeff-ir reads 1$"),
        ({"check": "1"}, r"metadata\.json is damaged \(a field is of the wrong type\)$"),
        ({"extra": 1}, r"metadata\.json is damaged \(.*unexpected keyword argument 'extra'\)$"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(BundleError, match=message):
            read_bundle(folder)
    path.write_text("{")
    with pytest.raises(BundleError, match=r"metadata\.json is damaged \("):
        read_bundle(folder)
    path.write_text(json.dumps(good))
    (folder / "model.onnx").write_bytes(b"\xff\xff nothing")
    with pytest.raises(BundleError, match=r"model\.onnx (is no ONNX file|cannot be read)"):
        read_bundle(folder)


def test_a_bundle_never_reads_outside_its_folder(tmp_path: Path) -> None:
    folder = fail("breaks-facts", tmp_path / "bundle", 1).folder
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(1 << 16))
    model = folder / "model.onnx"
    content = model.read_bytes()

    proto = onnx.load(str(model), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = "../secret.bin"
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(BundleError, match=r"refers to '\.\./secret\.bin', outside its own folder: refused$"):
        read_bundle(folder)

    outside = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../secret.bin")
    proto = onnx.load_model_from_string(content)
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["evil"], value=outside))
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(BundleError, match=r"refers to '\.\./secret\.bin', outside its own folder: refused$"):
        read_bundle(folder)

    model.unlink()
    model.symlink_to(secret)
    with pytest.raises(BundleError, match=r"model\.onnx leads out of the bundle: refused$"):
        read_bundle(folder)
    model.unlink()
    model.write_bytes(content)

    data = folder / "test_data_set_0" / "input_0.pb"
    data.write_bytes(outside.SerializeToString())
    with pytest.raises(BundleError, match=r"input_0\.pb refers to another file: refused$"):
        read_trace(folder)
    data.unlink()
    data.symlink_to(secret)
    with pytest.raises(BundleError, match=r"input_0\.pb leads out of the bundle: refused$"):
        read_trace(folder)
    data.unlink()
    data.write_bytes(b"\xff\xff nothing")
    with pytest.raises(BundleError, match=r"input_0\.pb is no ONNX tensor \(DecodeError\)$"):
        read_trace(folder)


def test_a_bundle_without_a_failing_pass_is_refused(tmp_path: Path) -> None:
    folder = fail("breaks-facts", tmp_path / "bundle", 1).folder
    path = folder / METADATA
    path.write_text(json.dumps({**json.loads(path.read_text()), "suffix": ""}))
    with pytest.raises(BundleError) as error:
        replay(read_bundle(folder))
    assert str(error.value) == f"{folder} names no failing pass: its suffix is empty"


def test_a_bundle_carries_what_its_pipeline_reads_and_reads_nothing_else(tmp_path: Path) -> None:
    """Also after it was moved, and without what lay outside."""
    adapter = tmp_path / "adapter"
    make(base("llama"), adapter, 0, r=4, target_modules=["q_proj"])
    (adapter / "notes.txt").write_text("not read")
    text = f"merge-lora{{adapter={adapter}}},merge-lora{{adapter={adapter}}},breaks-facts"
    module, capture = support.canonical("llama"), Capture(tmp_path / "made")
    with pytest.raises(QeffError):
        run_pipeline(module, Pipeline.parse(text), instruments=[capture])
    shutil.rmtree(adapter)
    folder = (tmp_path / "made").rename(tmp_path / "moved")
    assert sorted(p.name for p in (folder / "inputs" / "0").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    bundle = read_bundle(folder)
    assert str(bundle.pipeline).count(f"adapter={folder / 'inputs' / '0'}") == 2
    assert replay(bundle)[0]
    assert bisect(bundle).pass_id == "merge-lora"  # which changes numbers on purpose

    outside = tmp_path / "outside"
    make(base("llama"), outside, 0, r=4, target_modules=["q_proj"])
    (folder / "inputs" / "link").symlink_to(outside)
    path = folder / METADATA
    data = json.loads(path.read_text())
    for place in (str(outside), "../outside", "inputs/../../outside", "inputs/link", "\0", "/dev/zero"):
        evil = str(Pipeline((MergeLora(adapter=place),)))
        path.write_text(json.dumps({**data, "pipeline": f"{evil},breaks-facts", "suffix": evil, "check": 1}))
        for tool in (replay, bisect, reduce):
            with pytest.raises(BundleError, match="outside of the bundle: refused"):
                tool(read_bundle(folder))


def test_a_module_does_not_choose_where_its_bundle_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "home"))
    module = support.canonical("llama")
    for name in ("../../OUT/x", "/abs/x", "..", "", "x" * 5000, "a b\n"):
        module.name = name
        folder = default_folder(module.name, "attention#2")
        assert folder.resolve().parent == (tmp_path / "home" / "bundles").resolve()
        assert len(folder.name) < 120
    module.name = "../../OUT/x"
    path = save_module(module, tmp_path / "evil")
    with pytest.raises(VerificationError, match=r"module is '\.\./\.\./OUT/x', which is not a plain name"):
        load_onnx(path)


def test_files_of_a_bundle_are_regular_and_its_numbers_possible(tmp_path: Path) -> None:
    folder = fail("breaks-facts", tmp_path / "bundle", 1).folder
    path = folder / METADATA
    good = path.read_text()
    for change, message in (
        ({"seed": -1}, "no seed -1"),
        ({"check": 99}, "no check level 99"),
        ({"check": True}, "wrong type"),
        ({"versions": {"numpy": []}}, "a version is no text"),
        ({"version": "x" * 999}, "has schema version"),
    ):
        path.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(BundleError, match=message):
            read_bundle(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(BundleError, match=r"metadata\.json is damaged \(its text cannot be read as JSON"):
        read_bundle(folder)
    path.write_text(good)
    for name in ("model.onnx", "start/model.onnx", "test_data_set_0/input_0.pb"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(BundleError, match="is not a regular file: refused"):
            read_trace(folder) if name.endswith(".pb") else read_bundle(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    assert read_bundle(folder).metadata.pass_id == "breaks-facts"
