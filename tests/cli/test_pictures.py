"""``qeff compile --image-size`` and ``qeff run --image``: pictures from files, as a user gives them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing

from qeff_ir.cli.pictures import read_picture
from qeff_ir.runtime.picture_forms import PictureForms
from qeff_ir.runtime.picture_prompts import processed
from tests import multimodal, processors, support
from tests.processors import PROCESSORS

from .conftest import Qeff

SIZE = PROCESSORS["llava"].size
PROMPT = "w5 w6 <image> w7 w8"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    multimodal.lively("llava").save_pretrained(folder)
    processors.processor("llava").save_pretrained(folder)
    Image.fromarray(processors.picture(SIZE, 1)).save(folder / "cat.png")
    Image.fromarray(processors.picture((8, 8), 1)).save(folder / "dot.png")
    return folder


def right(prompt: str, *, with_picture: bool = True) -> str:
    """transformers' answer of four words."""
    processor = processors.processor("llava")
    images = {"images": [[processors.picture(SIZE, 1)]]} if with_picture else {}
    given = processor(text=[prompt], return_tensors="pt", **images)
    out = support.generate(multimodal.lively("llava"), **given, max_new_tokens=4, do_sample=False)
    return processor.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def test_a_package_answers_about_a_picture(qeff: Qeff, model: Path, tmp_path: Path) -> None:
    common = ("--target", "onnxruntime", "--prefill-seq-len", "8", "--ctx-len", "64")
    size = f"{SIZE[0]}x{SIZE[1]}"
    said = qeff("compile", model, "-o", tmp_path / "out", "--image-size", size, "--num-images", "2", *common)
    assert (said.code, said.err) == (0, "") and "--image FILE --prompt" in said.out
    ask = ("--image", model / "cat.png", "--prompt", PROMPT, "--max-new-tokens", "4")
    answer = right(PROMPT)
    assert len(answer.split()) == 4
    assert answer in qeff("run", tmp_path / "out", *ask).out
    assert answer in qeff("run", tmp_path / "out", *ask, "--stream").out
    assert answer in qeff("run", model, *ask, *common).out
    assert "Vision  " in qeff("cost", tmp_path / "out", "--program", "vision").out
    timed = qeff("cost", tmp_path / "out", "--program", "vision", "--device", "ultra")
    assert timed.code == 2 and "the program 'vision' takes none: leave it out" in " ".join(timed.err.split())
    small = qeff("run", tmp_path / "out", "--image", model / "dot.png", "--prompt", PROMPT, "--max-new-tokens", "4")
    assert small.code == 0  # this processor brings any picture to its own size
    words = ("--prompt", "w5 w6 w7", "--prompt", "w8 w9", "--max-new-tokens", "4")
    said = qeff("run", tmp_path / "out", *words)
    assert (said.code, said.err) == (0, "")
    assert all(right(prompt, with_picture=False) in said.out for prompt in ("w5 w6 w7", "w8 w9"))
    lost = qeff("run", tmp_path / "out", "--prompt", PROMPT)
    assert lost.code == 2 and "Found 1 <image> tokens in the text but no images" in " ".join(lost.err.split())


def test_one_program_answers_about_a_picture(qeff: Qeff, model: Path, tmp_path: Path) -> None:
    common = ("--target", "ai100", "--emit-only", "--prefill-seq-len", "8", "--ctx-len", "64")
    size = f"{SIZE[0]}x{SIZE[1]}"
    said = qeff("compile", model, "-o", tmp_path / "out", "--image-size", size, "--single-program", *common)
    assert (said.code, said.err) == (0, "") and not (tmp_path / "out" / "vision").exists()
    ask = ("--image", model / "cat.png", "--prompt", PROMPT, "--max-new-tokens", "4")
    assert right(PROMPT) in qeff("run", tmp_path / "out", *ask).out
    prefill, decode = json.loads(qeff("cost", tmp_path / "out", "--json").out)
    assert prefill["ops"]["Conv"]["nodes"] == 1 and "Conv" not in decode["ops"]  # the compiler leaves the encoder out


def test_tokens_looked_up_by_the_host_need_the_model(qeff: Qeff, model: Path, tmp_path: Path) -> None:
    common = ("--target", "onnxruntime", "--token-embedding", "host")
    said = qeff("compile", model, "-o", tmp_path / "host", "--image-size", f"{SIZE[0]}x{SIZE[1]}", *common)
    assert f"qeff run {model} --token-embedding host --image FILE" in " ".join(said.out.split())
    ask = ("--image", model / "cat.png", "--prompt", PROMPT, "--max-new-tokens", "4")
    assert right(PROMPT) in qeff("run", model, *common, *ask).out
    alone = qeff("run", tmp_path / "host", *ask)
    assert alone.code == 2 and "stay in the model's checkpoint" in alone.err


@pytest.mark.parametrize(
    ("target", "more"),
    [("onnxruntime", ()), pytest.param("ai100", ("--emit-only", "--single-program"), marks=pytest.mark.nightly)],
)
def test_verify_asks_about_pictures(
    target: str, more: tuple[str, ...], qeff: Qeff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multimodal.lively("gemma3").save_pretrained(tmp_path)  # whose tokens of pictures see one another, by their types
    processors.processor("gemma3").save_pretrained(tmp_path)
    size, shapes = "{}x{}".format(*PROCESSORS["gemma3"].size), ("--prefill-seq-len", "16", "--ctx-len", "64")
    words = ("verify", tmp_path, "--image-size", size, "--num-images", "2", "--target", target, *shapes, *more)
    said = qeff(*words, "--steps", "3")
    assert (said.code, said.err) == (0, "") and "Agrees with transformers: all tokens" in said.out
    assert re.search(rf"On {target}, 3 prompts of \d+, \d+, \d+ tokens", said.out)
    blind = PictureForms.split

    def other(forms: PictureForms, given: Any, *rest: Any) -> Any:
        return blind(forms, {name: 0 * array for name, array in given.items()}, *rest)

    monkeypatch.setattr(PictureForms, "split", other)
    told = qeff(*words, "--steps", "3")
    assert told.code == 1 and "MISMATCH" in told.out
    full = qeff(*words, "--steps", "60")
    assert full.code == 2 and "60 steps do not fit ctx_len=64" in " ".join(full.err.split())


def test_a_picture_stands_as_its_camera_was_held(tmp_path: Path) -> None:
    held = Image.Exif()
    held[0x0112] = 6  # a quarter turn
    drawn = processors.picture((20, 14), 1)
    Image.fromarray(drawn).save(tmp_path / "turned.png", exif=held)
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "turned.png")), np.rot90(drawn, -1))


def test_a_template_that_begins_a_text_does_so_once(model: Path) -> None:
    processor = processors.processor("llava")
    first = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    processor.tokenizer._tokenizer.post_processor = first
    picture = read_picture(model / "cat.png")
    plain = processed(processor, PROMPT, [picture])["input_ids"][0].tolist()
    assert plain[:2] == [1, 5]
    processor.chat_template = (
        "{{ bos_token }}{% for part in messages[0]['content'] %}"
        "{{ ' <image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    )
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "w5 w6"}]
    right = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    assert processed(processor, "w5 w6", [picture])["input_ids"].tolist() == right.tolist()
    assert right[0].tolist().count(1) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--image", "cat.png", "--prompt", "a", "--prompt", "b"), "--image belongs to one prompt, but got 2"),
        (("run", "--image", "none.png", "--prompt", "a"), "none.png' cannot be read"),
        (("run", "--image", "config.json", "--prompt", "a"), "config.json is not a picture that Pillow reads"),
        (("compile", "--image-size", "336"), "--image-size is '336': give height and width in pixels, as 336x336"),
        (("compile", "--single-program"), "--single-program is for models of pictures and text: give --image-size too"),
        (("verify", "--single-program"), "--single-program is for models of pictures and text: give --image-size too"),
        (
            ("compile", "--image-size", "90x90", "--num-images", "9", "--ctx-len", "128"),
            "9 pictures of 90 x 90 take up to 144 tokens",
        ),
    ],
)
def test_what_cannot_be_done_is_told(words: tuple[str, ...], message: str, qeff: Qeff, model: Path) -> None:
    named = [str(model / word) if word.endswith((".png", ".json")) else word for word in words[1:]]
    said = qeff(words[0], model, *named, "--target", "onnxruntime")
    assert said.code == 2 and message in " ".join(said.err.split())


def test_pictures_of_several_sizes_have_encoders_of_their_own(qeff: Qeff, tmp_path: Path) -> None:
    multimodal.lively("llava_next").save_pretrained(tmp_path / "model")
    processors.processor("llava_next").save_pretrained(tmp_path / "model")
    for name, size in (("tall", (20, 14)), ("wide", (14, 40)), ("large", (60, 200))):
        Image.fromarray(processors.picture(size, 1)).save(tmp_path / f"{name}.png")
    common = ("--target", "onnxruntime", "--prefill-seq-len", "8", "--ctx-len", "128")
    sizes = ("--image-size", "20x14", "--image-size", "14x40")
    assert qeff("compile", tmp_path / "model", "-o", tmp_path / "out", *sizes, *common).code == 0
    assert {path.name for path in tmp_path.glob("out/vision*")} == {"vision_20x14", "vision_14x40"}
    ask = ("--prompt", "w5 <image> w7", "--max-new-tokens", "4")
    said = [qeff("run", tmp_path / "out", "--image", tmp_path / f"{name}.png", *ask) for name in ("tall", "wide")]
    assert [one.code for one in said] == [0, 0] and said[0].out != said[1].out
    large = ("run", tmp_path / "out", "--image", tmp_path / "large.png", *ask)
    told = qeff(*large)
    assert (
        told.code == 2
        and "a picture is 60 x 200, and the model is compiled for 20 x 14, 14 x 40: pass " in " ".join(told.err.split())
    )
    assert qeff(*large, "--resize").code == 0
    lost = qeff("run", tmp_path / "out", "--prompt", "w5", "--resize")
    assert lost.code == 2 and "--resize is for the pictures of --image" in lost.err
