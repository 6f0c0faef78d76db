"""Weights are files below the folder, as the checkpoint has them; saving and loading is exact."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qeff_ir.errors import PackageError
from qeff_ir.frontend.source import open_source
from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.ir.printer import fingerprint
from qeff_ir.ir.snapshot import load_module, save_module
from qeff_ir.ranges import FileRange, file_range
from tests import support


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    support.tiny("llama")[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def _from_folder(checkpoint: Path) -> Module:
    return open_source(checkpoint).lower()


@pytest.fixture
def module(_from_folder: Module) -> Module:
    return _from_folder.clone()


def weights(module: Module, count: int = 21) -> dict[str, np.ndarray]:
    found = {
        n: v.const_value.numpy().copy()
        for n, v in module.graph.initializers.items()
        if WEIGHT_KEY in v.metadata_props and v.const_value is not None
    }
    assert len(found) == count
    return found


def test_lowering_refers_to_the_checkpoint(module: Module, checkpoint: Path) -> None:
    for value in module.graph.initializers.values():
        if WEIGHT_KEY in value.metadata_props:
            where = file_range(value.const_value)
            assert where is not None and where.file == (checkpoint / "model.safetensors").resolve()


def test_saved_weights_are_the_files_of_the_checkpoint(module: Module, checkpoint: Path, tmp_path: Path) -> None:
    path = save_module(module, tmp_path / "out")
    shared = tmp_path / "out" / "weights" / "model.safetensors"
    assert shared.read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert [p.name for p in shared.parent.iterdir()] == ["model.safetensors"]  # nothing was written beside it
    proto = onnx.load(path, load_external_data=False)
    outside = {t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert outside == set(weights(module))


def test_saving_and_loading_is_exact(module: Module, tmp_path: Path) -> None:
    loaded = load_module(save_module(module, tmp_path))
    assert fingerprint(loaded) == fingerprint(module)
    expected, got = weights(module), weights(loaded)
    assert expected.keys() == got.keys()
    for name, numbers in expected.items():
        np.testing.assert_array_equal(got[name], numbers)


def test_weights_of_a_model_in_memory_are_written_once(tmp_path: Path) -> None:
    module = support.lowered("llama")
    loaded = load_module(save_module(module, tmp_path))
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["model.data"]
    for name, numbers in weights(module).items():
        np.testing.assert_array_equal(weights(loaded)[name], numbers)


def test_what_was_loaded_can_be_saved_again(module: Module, tmp_path: Path) -> None:
    once = load_module(save_module(module, tmp_path / "one"))
    twice = load_module(save_module(once, tmp_path / "two"))
    assert [p.name for p in (tmp_path / "two" / "weights").iterdir()] == ["model.safetensors"]
    assert fingerprint(twice) == fingerprint(module)


def test_saving_leaves_the_module_as_it_was(module: Module, tmp_path: Path) -> None:
    before = fingerprint(module)
    save_module(module, tmp_path)
    assert fingerprint(module) == before
    assert file_range(module.graph.initializers["lm_head.weight"].const_value) is not None


def test_new_weights_beside_those_of_a_saved_module(tmp_path: Path) -> None:
    """What is saved first lies in a side file, which is linked when it is saved again, and must not be written then."""
    name, other = "lm_head.weight", "model.norm.weight"
    first = support.lowered("llama")
    before = weights(first)
    second = load_module(save_module(first, tmp_path / "one"))
    value = second.graph.initializers[name]
    value.const_value = ir.tensor(np.full(before[name].shape, 7.0, np.float32), name=name)
    third = weights(load_module(save_module(second, tmp_path / "two")))
    assert (third[name] == 7.0).all() and np.array_equal(third[other], before[other])
    # The folder of the first takes another module, whose side file has its name.
    save_module(support.lowered("gpt2"), tmp_path / "one")
    again = weights(load_module(tmp_path / "two" / "model.onnx"))
    assert all(np.array_equal(again[n], third[n]) for n in third)


def test_a_file_of_the_same_name_is_not_taken_for_another(tmp_path: Path) -> None:
    """Two modules of other folders are saved into one, under names of their own."""
    for name in ("llama", "gpt2"):
        module = load_module(save_module(support.lowered(name), tmp_path / name))
        save_module(module, tmp_path / "out", f"{name}.onnx")
    for name, count in (("llama", 21), ("gpt2", 28)):
        before = weights(support.lowered(name), count)
        after = weights(load_module(tmp_path / "out" / f"{name}.onnx"), count)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[n], after[n]) for n in before)


def test_two_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    module = support.lowered("llama")
    names = ["lm_head.weight", "model.norm.weight"]
    for number, name in enumerate(names):
        file = tmp_path / str(number) / "part.bin"
        file.parent.mkdir()
        value = module.graph.initializers[name]
        assert value.const_value is not None
        shape = tuple(value.const_value.shape.numpy())
        numbers = np.full(shape, float(number + 1), np.float32)
        file.write_bytes(numbers.tobytes())
        value.const_value = FileRange(file, 0, numbers.nbytes, ir.DataType.FLOAT, shape).tensor(name)
    loaded = weights(load_module(save_module(module, tmp_path / "out")))
    assert [loaded[n].flat[0] for n in names] == [1.0, 2.0]


def test_an_onnx_file_that_refers_outside_its_folder_is_refused(module: Module, tmp_path: Path) -> None:
    path = save_module(module, tmp_path / "in")
    shutil.copy(tmp_path / "in" / "weights" / "model.safetensors", tmp_path / "secret")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(PackageError, match="outside its own folder: refused"):
        load_module(path)


def test_a_link_out_of_the_folder_is_refused(module: Module, tmp_path: Path) -> None:
    path = save_module(module, tmp_path / "in")
    weight = tmp_path / "in" / "weights" / "model.safetensors"
    weight.rename(tmp_path / "secret")
    weight.symlink_to(tmp_path / "secret")
    with pytest.raises(PackageError, match=r"leads to .*secret, outside of .*in: refused"):
        load_module(path)


@pytest.mark.parametrize("harm", ["missing", "short"])
def test_a_damaged_weight_file_is_told(harm: str, module: Module, tmp_path: Path) -> None:
    path = save_module(module, tmp_path)
    weight = tmp_path / "weights" / "model.safetensors"
    data = weight.read_bytes()
    weight.unlink()
    if harm == "short":
        weight.write_bytes(data[: len(data) // 2])
    with pytest.raises(PackageError, match="is missing or too short: compile again"):
        load_module(path)


def test_a_checkpoint_that_is_gone_is_told(module: Module, tmp_path: Path) -> None:
    value = module.graph.initializers["lm_head.weight"]
    where = file_range(value.const_value)
    assert where is not None
    gone = FileRange(tmp_path / "gone", where.offset, where.length, where.dtype, where.shape)
    value.const_value = gone.tensor("lm_head.weight")
    with pytest.raises(PackageError, match="gone is gone: restore it, or lower the model again"):
        save_module(module, tmp_path / "out")
