"""Every tool of ONNX opens what is saved, nobody's file is changed, and nothing large is written in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.reference
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from qeff_ir import sharing
from qeff_ir.debug.plain import load_onnx
from qeff_ir.errors import PackageError
from qeff_ir.frontend.checkpoint.references import read_header
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.ir.snapshot import save_module
from qeff_ir.storage import save_model

N = 64
WEIGHT = np.random.default_rng(0).standard_normal((N, N)).astype(np.float32)


def info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", N])


def saved(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], path: Path, **rest: Any) -> Path:
    """An ONNX file whose tensors, attributes included, are in a file beside it."""
    graph = helper.make_graph(nodes, "g", [info("x")], [info("y")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, **rest)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0, convert_attribute=True)
    return path


def one_product(path: Path) -> Path:
    return saved([helper.make_node("MatMul", ["x", "w"], ["y"])], [numpy_helper.from_array(WEIGHT, "w")], path)


def branches(path: Path, size: int = N) -> Path:
    """Weights in both branches of an If."""
    zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")

    def branch(name: str, factor: float) -> onnx.GraphProto:
        weight = numpy_helper.from_array((WEIGHT * factor)[:, :size].copy(), f"w{name}")
        wide = numpy_helper.from_array(np.ones((size, N), np.float32), f"v{name}")
        nodes = [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"t{name}"]),
            helper.make_node("MatMul", [f"t{name}", f"v{name}"], [f"z{name}"]),
        ]
        return helper.make_graph(nodes, name, [], [info(f"z{name}")], [weight, wide])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("a", 1), else_branch=branch("b", 2)),
    ]
    return saved(nodes, [zero], path)


def small_branches(path: Path) -> Path:
    """Up to 1 KiB each."""
    return branches(path, 2)


def constants(path: Path) -> Path:
    """A large and a small tensor in attributes, and a small initializer whose numbers decide on shapes."""
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT, "w")),
        helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(WEIGHT[0].copy(), "b")),
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Reshape", ["q", "s"], ["y"]),
    ]
    return saved(nodes, [numpy_helper.from_array(np.array([-1, N]), "s")], path)


def function(path: Path) -> Path:
    """A tensor in the body of a function."""
    inner = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT, "w")),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
    ]
    made = helper.make_function("own", "F", ["a"], ["b"], inner, [helper.make_opsetid("", 21)])
    graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="own")], "g", [info("x")], [info("y")])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[made])
    tensor = model.functions[0].node[0].attribute[0].t
    path.parent.mkdir(exist_ok=True)
    (path.parent / "m.data").write_bytes(b"\0" * 8 + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "m.data"), ("offset", "8"), ("length", str(WEIGHT.nbytes))):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def answer(path: Path) -> np.ndarray:
    """Of ONNX's own interpreter."""
    session = onnx.reference.ReferenceEvaluator(onnx.load(path))
    (found,) = session.run(None, {"x": np.arange(2 * N, dtype=np.float32).reshape(2, N) / N})
    return np.asarray(found)


def assert_every_tool_opens(path: Path) -> None:
    whole = onnx.load(path)
    onnx.checker.check_model(path)
    assert gs.import_onnx(whole).nodes
    for value in ir.load(path).graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    assert ort.InferenceSession(path, options).get_outputs()


@pytest.mark.parametrize("make", [one_product, branches, small_branches, constants, function], ids=lambda f: f.__name__)
def test_what_is_saved_is_read_by_every_tool_and_answers_alike(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "mine" / "m.onnx")
    data, expected = path.parent / "m.data", answer(path)
    before = (path.read_bytes(), data.read_bytes(), data.stat())
    out = save_module(load_onnx(path), tmp_path / "out")
    twice = save_module(load_onnx(out), tmp_path / "twice")
    path.rename(tmp_path / "away.onnx")  # nothing refers to where it came from
    data.rename(tmp_path / "away.data")
    for result in (out, twice):
        np.testing.assert_array_equal(answer(result), expected)
        assert_every_tool_opens(result)
    assert (tmp_path / "away.onnx").read_bytes() == before[0] and (tmp_path / "away.data").read_bytes() == before[1]
    after = (tmp_path / "away.data").stat()
    assert (after.st_nlink, after.st_ino, after.st_mtime_ns) == (1, before[2].st_ino, before[2].st_mtime_ns)


def test_small_constants_are_in_the_onnx_file(tmp_path: Path) -> None:
    """ONNX Runtime does not read a shape from another file."""
    path = constants(tmp_path / "mine" / "m.onnx")
    with pytest.raises(Exception, match="external"):
        ort.InferenceSession(path)
    out = save_module(load_onnx(path), tmp_path / "out")
    proto = onnx.load(out, load_external_data=False)
    assert [t.data_location for t in proto.graph.initializer] == [TensorProto.DEFAULT]
    session: Any = ort.InferenceSession(out)
    assert session.run(None, {"x": np.ones((3, N), np.float32)})[0].shape == (3, N)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("location", "../m.data", "outside its own folder: refused"), ("location", "/etc/passwd", "outside its own"),
        ("location", "a\0b", "missing or too short"), ("location", "gone", "missing or too short"),
        ("location", "pipe", "is not a regular file: refused"), ("location", "out", "leads to .*: refused"),
        ("location", "loop", "missing or too short"), ("offset", "4", "missing or too short"),
        ("length", "8", r"has 16384 bytes, and 8 from \d+ on"), ("length", "99999", "has 16384 bytes, and 99999"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [one_product, branches, constants, function], ids=lambda f: f.__name__)
def test_a_reference_that_leads_nowhere_is_told(
    make: Callable[[Path], Path], key: str, value: str, text: str, tmp_path: Path
) -> None:
    """Wherever it stands: in the graph, a subgraph, an attribute, a function."""
    path = make(tmp_path / "mine" / "m.onnx")
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    (path.parent / "out").symlink_to("../secret")
    (path.parent / "loop").symlink_to("loop")
    os.mkfifo(path.parent / "pipe")
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in onnx.external_data_helper._get_all_tensors(proto) if t.dims == [N, N])
    entries = {e.key: e.value for e in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, entry in entries.items():
        tensor.external_data.add(key=name, value=entry)
    if key == "offset":
        data = path.parent / "m.data"
        data.write_bytes(data.read_bytes()[: int(value) + WEIGHT.nbytes - 1])
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(PackageError, match=text):
        load_onnx(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"w": WEIGHT}, path)
    return path


def package(checkpoint: Path, out: Path, **rest: Any) -> Path:
    """A model on a checkpoint's weight."""
    x = ir.val("x", ir.DataType.FLOAT, ["n", N])
    weight = ir.val("w", ir.DataType.FLOAT, [N, N], const_value=read_header(checkpoint)["w"].tensor("w"))
    weight.metadata_props[WEIGHT_KEY] = "w"
    node = ir.node("MatMul", [x, weight])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["n", N])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name="g")
    save_model(ir.Model(graph, ir_version=10), out, "model.onnx", **rest)
    return out / "weights" / checkpoint.name


def test_a_package_of_a_checkpoint_is_read_by_every_tool(checkpoint: Path, tmp_path: Path) -> None:
    weights = package(checkpoint, tmp_path / "out")
    assert (weights.stat().st_nlink, checkpoint.stat().st_nlink) == (1, 1)
    assert_every_tool_opens(tmp_path / "out" / "model.onnx")
    checkpoint.write_bytes(b"rewritten in place")
    np.testing.assert_allclose(answer(tmp_path / "out" / "model.onnx"), answer_of_weight(), rtol=1e-5)


def answer_of_weight() -> np.ndarray:
    return np.arange(2 * N, dtype=np.float32).reshape(2, N) / N @ WEIGHT


@pytest.mark.parametrize(
    ("chosen", "limit", "prefer", "linked"),
    [
        ("", 1 << 30, False, False), ("", 0, False, True), ("copy", 0, True, False), ("link", 1 << 30, False, True),
        ("", 1 << 30, True, True),
    ],
)  # fmt: skip
def test_who_decides_between_copy_and_link(
    chosen: str,
    limit: int,
    prefer: bool,
    linked: bool,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QEFF_WEIGHTS", chosen)
    monkeypatch.setattr(sharing, "COPY_LIMIT", limit)
    weights = package(checkpoint, tmp_path / "out", prefer_links=prefer)
    assert weights.samefile(checkpoint) == linked and weights.read_bytes() == checkpoint.read_bytes()
    # A file that an ONNX file names gets no link, whoever asks.
    path = one_product(tmp_path / "mine" / "m.onnx")
    save_module(load_onnx(path), tmp_path / "plain")
    assert (path.parent / "m.data").stat().st_nlink == 1
    assert_every_tool_opens(path)


def test_a_large_copy_is_announced(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(checkpoint, tmp_path / "silent")
    monkeypatch.setattr(sharing, "_WORTH_SAYING", 1)
    with pytest.warns(UserWarning, match=r"^copying 0\.0 GB of weights to .*weights: this file system has no clones; "):
        package(checkpoint, tmp_path / "said")


def test_another_choice_is_told(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_WEIGHTS", "symlink")
    with pytest.raises(PackageError, match=r"\$QEFF_WEIGHTS is 'symlink': set it to copy or link, or to nothing"):
        package(checkpoint, tmp_path / "out")


def test_holes_are_not_written(tmp_path: Path) -> None:
    source, target = tmp_path / "sparse", tmp_path / "copy"
    with source.open("wb") as file:
        for at in (0, 5 << 30, (9 << 30) - 4):
            file.seek(at)
            file.write(b"data")
        file.truncate(11 << 30)
    sharing.share({source: target}, [source])
    assert target.stat().st_size == 11 << 30 and not target.samefile(source)
    assert target.stat().st_blocks <= source.stat().st_blocks < 100
    with target.open("rb") as file:
        for at in (0, 5 << 30, (9 << 30) - 4):
            file.seek(at)
            assert file.read(4) == b"data"


def test_a_clone_is_taken_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This disk has none, so that the kernel's part is played; everything else is real."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"weights")
    asked: list[int] = []

    def ioctl(new: Any, request: int, old: int) -> int:
        asked.append(request)
        new.write(os.pread(old, 100, 0))
        return 0

    monkeypatch.setattr(sharing.fcntl, "ioctl", ioctl)
    monkeypatch.setenv("QEFF_WEIGHTS", "link")
    sharing.share({source: target}, [source])
    assert target.read_bytes() == b"weights" and not target.samefile(source)
    assert asked == [0x40049409]  # FICLONE of linux/fs.h


def test_a_disk_that_fails_at_a_clone_is_not_asked_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "source").write_bytes(b"weights")
    monkeypatch.setattr(sharing.fcntl, "ioctl", ioctl)
    with pytest.raises(OSError, match="Input/output error"):
        sharing.share({tmp_path / "source": tmp_path / "target"}, [])
