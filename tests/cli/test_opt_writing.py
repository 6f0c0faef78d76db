"""``qeff opt -o`` writes all or nothing, replaces only what it wrote itself, and leaves the user's files alone."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import onnx
import pytest

from qeff_ir.demo import MODEL_FOLDER
from qeff_ir.ir import snapshot
from qeff_ir.ir.snapshot import load_module
from tests.test_sharing import one_product

from .conftest import Qeff


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """An ONNX file of the user's, with its weights beside it."""
    return one_product(tmp_path / "mine" / "m.onnx")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["out", "out.onnx"])
def test_the_result_is_read_by_onnx_and_the_users_file_still_is(
    name: str, mine: Path, qeff: Qeff, tmp_path: Path
) -> None:
    before = tree(mine.parent)
    for _ in range(2):  # the second replaces the first
        said = qeff("opt", mine, "-p", "canonicalize", "-o", tmp_path / name)
        assert (said.code, said.err) == (0, "")
        result = tmp_path / name if name.endswith(".onnx") else tmp_path / name / "model.onnx"
        assert f"Result:  {result}\n" in said.out
        onnx.checker.check_model(result)
        (tensor,) = onnx.load(result).graph.initializer
        assert tensor.raw_data == before["m.data"]
        assert len(load_module(result).graph) == 1
    assert tree(mine.parent) == before
    onnx.load(mine)
    others = {path.name for path in tmp_path.iterdir()} - {"mine", name}
    assert others == {path.name for path in tmp_path.glob("out.weights-*")} and len(others) == (name == "out.onnx")


@pytest.mark.parametrize("name", ["out", "out.onnx"])
def test_a_result_is_the_next_input_in_its_own_place(name: str, mine: Path, qeff: Qeff, tmp_path: Path) -> None:
    for source in (mine, tmp_path / name, tmp_path / name):
        assert qeff("opt", source, "-p", "canonicalize", "-o", tmp_path / name).code == 0
    result = tmp_path / name if name.endswith(".onnx") else tmp_path / name / "model.onnx"
    assert onnx.load(result).graph.initializer[0].raw_data == (mine.parent / "m.data").read_bytes()


def test_folders_of_the_users_beside_a_result_stay(mine: Path, qeff: Qeff, tmp_path: Path) -> None:
    """What is removed has the very names that builds give: eight digits of a hexadecimal number at the end."""
    ours = ["out.weights-01234567", ".out.onnx.partial-89abcdef"]
    theirs = [
        "out.weights", "out.weights-backup", "out.weights-0123456", "out.weights-012345678", "out.weights-0123456G",
        "out2.weights-01234567", "our.out.weights-01234567", ".out.onnx.partial-mine", ".out.onnx.partial-89abcdef2",
        ".out.partial-89abcdef",
    ]  # fmt: skip
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text(name)
    for _ in range(2):
        assert qeff("opt", mine, "-p", "canonicalize", "-o", tmp_path / "out.onnx").code == 0
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name / "data").read_text() == name for name in theirs)


@pytest.mark.parametrize("what", ["another onnx", "a file beside it", "a weight file beside it", "a folder", "a file"])
def test_what_opt_did_not_write_is_not_replaced(what: str, mine: Path, qeff: Qeff, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "another onnx":
        one_product(out / "model.onnx")
    elif what == "a file":
        out.write_text("mine")
    else:
        assert qeff("opt", mine, "-p", "canonicalize", "-o", out).code == 0
        if what == "a folder":
            (out / "model.onnx").unlink()
        else:
            (out / ("weights/mine" if "weight" in what else "mine")).write_text("mine")
    before = out.read_bytes() if what == "a file" else tree(out)
    said = qeff("opt", mine, "-p", "canonicalize", "-o", out)
    assert (
        said.complaint == f"qeff: error: {out} exists and is not a folder of qeff opt alone: remove it, or choose "
        "another -o\n"
    )
    assert (out.read_bytes() if what == "a file" else tree(out)) == before


def test_an_onnx_file_that_opt_did_not_write_is_not_replaced(mine: Path, qeff: Qeff) -> None:
    before = tree(mine.parent)
    said = qeff("opt", mine, "-p", "canonicalize", "-o", mine)
    assert (
        said.complaint == f"qeff: error: {mine} exists and was not written by qeff: remove it, or choose another -o\n"
    )
    assert tree(mine.parent) == before


@pytest.mark.parametrize("name", ["out", "out.onnx"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_what_was_there(
    there: bool, name: str, mine: Path, qeff: Qeff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        qeff("opt", mine, "-p", "canonicalize", "-o", tmp_path / name)
    before, real = tree(tmp_path), snapshot.save_model

    def save(*arguments: object, **rest: object) -> None:
        real(*arguments, **rest)  # pyright: ignore[reportArgumentType]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "save_model", save)
    said = qeff("opt", mine, "-p", "canonicalize", "-o", tmp_path / name)
    assert said.complaint.startswith(f"qeff: error: the disk is full while writing {tmp_path / name}: free some space")
    assert tree(tmp_path) == before


def test_hard_links_are_said(qeff: Qeff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = r"^Weights:  0\.0 GB are hard links, which onnx does not read; QEFF_WEIGHTS=copy copies them$"
    for choice in ("copy", "link"):
        monkeypatch.setenv("QEFF_WEIGHTS", choice)
        said = qeff("compile", MODEL_FOLDER, "--target", "onnxruntime", "-o", tmp_path / choice)
        assert bool(re.search(text, said.out, re.MULTILINE)) == (choice == "link")
