"""``qeff demo --vision``, the bundled model of pictures and text, and the pictures that it is asked about."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qeff_ir.cli import demo_pictures as demo
from qeff_ir.cli.blocks import Blocks
from qeff_ir.demo import train_pictures as recipe
from qeff_ir.demo.pictures import (
    COLORS,
    PICTURE_MODEL_FOLDER,
    SIZE,
    Drawn,
    Mark,
    demo_pictures,
    demo_questions,
    draw,
    held_out,
)

from .conftest import ROOT, Qeff


def test_two_demos_at_once_are_refused(qeff: Qeff) -> None:
    assert "--lora and --vision are two demos" in qeff("demo", "--lora", "--vision").complaint


def test_pillow_is_asked_for(qeff: Qeff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert "pip install pillow" in qeff("demo", "--vision").complaint


def test_answers_that_differ_from_the_reference_are_told() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    tokens = logits.argmax(-1)
    # The second answer ends after two tokens; what follows is not compared.
    reference = [demo.Answer(tokens[:, 0], logits[:, 0]), demo.Answer(tokens[:2, 1], logits[:2, 1])]
    beyond = logits.copy()
    beyond[2, 1] += 9
    found = demo.compared((tokens, beyond), reference)
    assert (found.agreement, found.error) == (3, 0)
    other = tokens.copy()
    other[1, 1] += 1
    assert demo.compared((other, logits), reference).agreement == 1
    nudged = logits.copy()
    nudged[1, 1, 2] += 0.5
    assert demo.compared((tokens, nudged), reference).errors[1] > 0.1
    early = demo.compared((tokens[:2], logits[:2]), reference)
    assert not early.equal(1.0) and early.errors[2] == float("inf")


def test_bundled_files_are_those_of_the_recipe(tmp_path: Path) -> None:
    recipe.build_processor().save_pretrained(tmp_path)
    model = recipe.build_model()
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    bundled = {path.name for path in PICTURE_MODEL_FOLDER.iterdir()}
    assert bundled == made | {"model.safetensors", "README.md"}
    for name in made:
        ours, theirs = ((folder / name).read_text() for folder in (PICTURE_MODEL_FOLDER, tmp_path))
        assert plain(ours) == plain(theirs), name
    digest = hashlib.sha256((PICTURE_MODEL_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (PICTURE_MODEL_FOLDER / "README.md").read_text()
    assert sum(path.stat().st_size for path in PICTURE_MODEL_FOLDER.iterdir()) < 3_000_000
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "qeff_ir.demo"
    ]
    assert any(PICTURE_MODEL_FOLDER.name == Path(pattern).parent.name for pattern in packaged)


def plain(text: str) -> Any:
    """A file without what versions of transformers and the way of loading add to it."""
    if not text.startswith("{\n"):
        return text
    drop = {"transformers_version", "dtype", "architectures"}

    def kept(value: Any) -> Any:
        return {k: kept(v) for k, v in value.items() if k not in drop} if isinstance(value, dict) else value

    return kept(json.loads(text))


def test_the_bundled_model_is_right_about_new_pictures() -> None:
    from transformers import AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText
    model = loader.from_pretrained(PICTURE_MODEL_FOLDER)
    shares = recipe.accuracy(model, 60, kept=True, seed=77)
    assert len(shares) == 9 and shares["all"] > 0.98


def test_what_is_drawn_is_what_is_asked() -> None:
    rng = random.Random(5)
    for count in (0, 1, 4):
        picture = draw(rng, kept=True, count=count)
        assert picture.pixels.shape == (SIZE, SIZE, 3) and len(picture.marks) == max(count, 1)
        for mark in picture.marks:  # each in its color, where it should be
            near = picture.pixels[int(mark.y), int(mark.x)]
            box = picture.pixels[
                int(mark.y - mark.radius) : int(mark.y + mark.radius) + 1,
                int(mark.x - mark.radius) : int(mark.x + mark.radius) + 1,
            ]
            nearest = box.reshape(-1, 3)[box.reshape(-1, 3).astype(int).sum(1).argmax()] if count == 0 else near
            assert (
                min(COLORS, key=lambda name: np.abs(np.subtract(COLORS[name], nearest.astype(int))).sum()) == mark.color
            )
    shapes = [draw(rng, kept=kept, count=3).marks for kept in (True, False) for _ in range(20)]
    assert [held_out(tuple(sorted((m.kind, m.color) for m in marks))) for marks in shapes] == [True] * 20 + [False] * 20
    marks = tuple(
        Mark(k, c, x, 10, 5)
        for k, c, x in [
            (
                "circle",
                "red",
                6,
            ),
            ("square", "red", 16),
            ("circle", "blue", 26),
        ]
    )
    answers = {q.text: q.answer for q in Drawn(marks, np.zeros((SIZE, SIZE, 3), np.uint8)).questions()}
    assert answers["What is there from left to right?"] == "red circle, red square, blue circle"
    assert (answers["How many are red?"], answers["How many circles are there?"]) == ("2", "2")
    assert (answers["What color is the square?"], answers["What shape is blue?"]) == ("red", "circle")
    assert "What color is the circle?" not in answers and "What shape is red?" not in answers


@pytest.mark.parametrize("colored", [True, False])
def test_blocks_show_two_pixels_a_character(colored: bool) -> None:
    pixels = np.zeros((4, 3, 3), np.uint8)
    pixels[:2, 1] = 250, 10, 10
    pixels[3, 2] = 10, 250, 10
    out = io.StringIO()
    console = Console(file=out, width=20, force_terminal=colored, color_system="truecolor" if colored else None)
    console.print(Blocks(pixels, {"r": (255, 0, 0), "g": (0, 255, 0)}))
    if colored:
        red, green, black = "250;10;10", "10;250;10", "0;0;0"
        assert f"38;2;{red};48;2;{red}m▀" in out.getvalue() and f"38;2;{black};48;2;{green}m▀" in out.getvalue()
    else:
        assert out.getvalue().split() == [".r.", "..g"]


def test_the_demo_is_right_on_both_targets(qeff: Qeff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = demo_pictures()
    said = qeff("demo", "--vision", "-o", tmp_path)
    assert (said.code, said.err) == (0, "")
    beside = " ".join(" ".join(line[SIZE:] for line in said.out.splitlines()).split())
    for question in (question for picture in pictures for question in demo_questions(picture)):
        assert f"{question.text} {question.answer} ✓✓" in beside
    for target in ("ai100", "onnxruntime"):
        assert f"\n{target} " in said.out and (tmp_path / f"{target}-vision" / "vision").is_dir()
    assert "✗" not in said.out and "every token and logit agrees with transformers" in said.out
    assert max(map(len, said.out.splitlines()[2:])) <= 80
    # The kill test: with another picture before its eyes, the same model is wrong.
    others = [Drawn(picture.marks, other.pixels) for picture, other in zip(pictures, pictures[::-1], strict=True)]
    monkeypatch.setattr("qeff_ir.demo.pictures.demo_pictures", lambda: others)
    said = qeff("demo", "--vision", "--target", "onnxruntime", "-o", tmp_path)
    assert said.code == 1 and "Something is wrong on onnxruntime" in said.out
    assert "✗  onnxruntime; right: " in said.out
