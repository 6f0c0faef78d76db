"""Checkpoints as they come: sharded, tied, half precision, one file, symbolic links of the hub's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qeff_ir.errors import PackageError
from qeff_ir.frontend.checkpoint.references import open_checkpoint
from qeff_ir.frontend.checkpoint.skeleton import build_skeleton
from qeff_ir.frontend.checkpoint.weights import checkpoint_weights
from qeff_ir.ir.module import WEIGHT_KEY
from qeff_ir.storage import load_model, save_model
from tests.models import build


def whole(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)


def sharded(folder: Path, model: Any) -> None:
    model.save_pretrained(folder, max_shard_size="40KB")


def hub_cache(folder: Path, model: Any) -> None:
    """Files are links to blobs that are named by their digest."""
    sharded(folder, model)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for index, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(blobs / f"{index:064x}")
        file.symlink_to(Path("..") / ".." / "blobs" / f"{index:064x}")


LAYOUTS: list[Callable[[Path, Any], None]] = [whole, sharded, hub_cache]


def packaged(name: str, layout: Callable[[Path, Any], None], dtype: torch.dtype, folder: Path, out: Path) -> Any:
    """A model's weights through a checkpoint and a package; returns what they were."""
    folder.mkdir(parents=True)
    model: Any = build(name)[1]
    layout(folder, model.to(dtype))
    skeleton = build_skeleton(model.config)
    weights = checkpoint_weights(skeleton, open_checkpoint(folder))
    values = [ir.val(n, const_value=t) for n, t in weights.items()]
    for value in values:
        value.metadata_props[WEIGHT_KEY] = str(value.name)
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 24}, name="weights")
    save_model(ir.Model(graph, ir_version=11), out, "model.onnx")
    return {n: t.float().numpy() for n, t in model.state_dict().items()}


def loaded(out: Path) -> dict[str, np.ndarray]:
    values = load_model(out / "model.onnx").graph.initializers
    return {n: v.const_value.numpy().copy() for n, v in values.items() if v.const_value is not None}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected) and len(found) > 10
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 ties its embedding
def test_a_package_holds_the_weights_of_any_layout(
    name: str, layout: Callable[[Path, Any], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    expected = packaged(name, layout, dtype, tmp_path / "snapshots" / "0", out)
    assert_equal(loaded(out), expected)
    files = list((out / "weights").iterdir())
    checkpoint = {path.resolve() for path in (tmp_path / "snapshots" / "0").glob("*.safetensors")}
    assert {f.read_bytes() for f in files} == {f.read_bytes() for f in checkpoint}
    assert len(files) == len(checkpoint) and all(f.stat().st_nlink == 1 for f in (*files, *checkpoint))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Any:
    """A folder on another file system."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        if os.stat(name).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("/dev/shm is on the file system of the temporary files")
        yield Path(name)


def test_on_another_file_system_the_weights_are_copied(tmp_path: Path, elsewhere: Path) -> None:
    expected = packaged("llama", hub_cache, torch.float32, tmp_path / "snapshots" / "0", elsewhere)
    assert_equal(loaded(elsewhere), expected)
    assert all(path.stat().st_nlink == 1 for path in (elsewhere / "weights").iterdir())


def test_a_copy_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range

    def damage(old: int, new: int, count: int, *places: int) -> int:
        done = real(old, new, count, *places)
        os.pwrite(new, b"?", 99)
        return done

    monkeypatch.setattr(os, "copy_file_range", damage)
    with pytest.raises(PackageError, match="is not equal to it: check the disk"):
        packaged("llama", whole, torch.float32, tmp_path / "snapshots" / "0", tmp_path / "out")


def test_a_failure_that_is_not_about_links_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setenv("QEFF_WEIGHTS", "link")
    with pytest.raises(OSError, match="No space left"):
        packaged("llama", whole, torch.float32, tmp_path / "snapshots" / "0", tmp_path / "out")
