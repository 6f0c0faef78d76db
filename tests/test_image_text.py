"""`QEFFAutoModelForImageTextToText`: from a folder and a processor's output to transformers' tokens."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qeff_ir import QEFFAutoModelForImageTextToText
from qeff_ir.auto import picture_runner
from qeff_ir.errors import CompileError, ModelLoadError, PackageError, RuntimeInputError, UnsupportedModelError
from qeff_ir.frontend.picture_source import PictureSource
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.numerics import error_over_rms
from qeff_ir.package import MAIN, SIDE_FOLDER, open_package
from qeff_ir.runtime.picture_form import FILE
from qeff_ir.runtime.picture_forms import PictureForms
from tests import multimodal, processors, support
from tests.processors import PROCESSORS

NEW = 6
LOOSE = 1e-3
"""Bound of the error of logits: above that of single precision, far below what a token that is not seen makes."""
SHAPES: dict[str, Any] = {"prefill_seq_len": 8, "ctx_len": 192, "batch_size": 2, "num_images": 2}


@functools.cache
def processor(name: str) -> Any:
    return processors.processor(name)


def texts(name: str) -> list[str]:
    """Two pictures between words, and one before some."""
    place = PROCESSORS[name].place
    return [f"w5 w6 {place} w7 w8 w9 {place} w10 w11", f"{place} w12 w13 w14"]


def pictures(name: str, seeds: list[int]) -> list[np.ndarray[Any, Any]]:
    return [processors.picture(PROCESSORS[name].size, seed) for seed in seeds]


def processed(name: str, images: list[list[Any]], text: list[str]) -> dict[str, Any]:
    return dict(processor(name)(images=images, text=text, return_tensors="pt", padding=True))


def expected(name: str, images: list[Any], text: str) -> list[int]:
    """transformers' greedy answer to one prompt."""
    given = processed(name, [images], [text])
    out = support.generate(multimodal.lively(name), **given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return out[0, -NEW:].tolist()


def logits(model: Any, **given: Any) -> np.ndarray[Any, Any]:
    """Of the first new token, ``[batch, vocab]``."""
    out = model.generate(
        **given, max_new_tokens=1, min_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.logits[0].numpy()


def answered(model: QEFFAutoModelForImageTextToText, **given: Any) -> list[list[int]]:
    out = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return out[:, -NEW:].tolist()


def compiled(name: str, out: Path, target: str = "onnxruntime", **more: Any) -> QEFFAutoModelForImageTextToText:
    """The tiny model of a folder, compiled."""
    folder = out / "model"
    if not folder.exists():
        multimodal.lively(name).save_pretrained(folder)
        processor(name).save_pretrained(folder)
    model = QEFFAutoModelForImageTextToText.from_pretrained(folder)
    paths = model.compile(
        target=target, image_size=PROCESSORS[name].size, compile_dir=out / target, emit_only=True, **{**SHAPES, **more}
    )
    assert paths == {"vision_qpc_path": str(out / target / "vision"), "lang_qpc_path": str(out / target)}
    return model


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForImageTextToText:
    return compiled("llava", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("target", ["onnxruntime", "ai100"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_tokens_are_those_of_transformers(name: str, target: str, tmp_path: Path) -> None:
    answers_like_transformers(compiled(name, tmp_path, target), name)


def answers_like_transformers(model: QEFFAutoModelForImageTextToText, name: str) -> None:
    """Rows of two pictures and one, then of one and none, in tokens and in logits; each picture spans prefill runs."""
    text, images = texts(name), [pictures(name, [1, 2]), pictures(name, [3])]
    right = [expected(name, own, said) for own, said in zip(images, text, strict=True)]
    assert answered(model, **processed(name, images, text)) == right
    bare = {key: value for key, value in processed(name, images, text).items() if key != "attention_mask"}
    assert answered(model, **bare) == right  # the pad token tells
    found = logits(model, **processed(name, images, text))
    for row, (own, said) in enumerate(zip(images, text, strict=True)):  # finer than tokens
        one = logits(multimodal.lively(name), **processed(name, [own], [said]))[0]
        assert error_over_rms(found[row], one) <= LOOSE
    # Fewer pictures than before, and a row without one.
    words = "w20 w21 w22"
    given = processed(name, [pictures(name, [4])], [text[1]])
    other = expected(name, pictures(name, [4]), text[1])
    ids = processor(name).tokenizer([words], return_tensors="pt", add_special_tokens=True)["input_ids"]
    with torch.no_grad():
        plain = support.generate(
            multimodal.lively(name), input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )[0, -NEW:].tolist()
    width = given["input_ids"].shape[1]
    blank = width - ids.shape[1]
    given["input_ids"] = torch.cat([given["input_ids"], torch.nn.functional.pad(ids, (blank, 0))])
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][1, :blank] = 0
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in given:
            given[key] = torch.cat([given[key], torch.zeros_like(given[key])])
    for key, form in model.runner().forms.inputs.items():
        if form.axis != form.row_axis:
            given[key] = torch.cat([given[key], torch.zeros_like(given[key])], dim=form.row_axis)
    assert answered(model, **given) == [other, plain]
    assert other != right[1]  # the pictures are seen


def test_types_that_tell_pictures_come_first(tmp_path: Path) -> None:
    model = compiled("qwen2_5_vl", tmp_path)
    images = [pictures("qwen2_5_vl", [1, 2]), pictures("qwen2_5_vl", [3])]
    given = processed("qwen2_5_vl", images, texts("qwen2_5_vl"))
    assert given["mm_token_type_ids"].any()
    right = answered(model, **given)
    assert answered(model, **given, token_type_ids=torch.zeros_like(given["input_ids"])) == right
    with pytest.raises(RuntimeInputError, match=r"the types of tokens are int64 \[1, 3\], and the tokens \[2, "):
        answered(model, **{**given, "mm_token_type_ids": torch.zeros(1, 3, dtype=torch.long)})


def test_two_threads_compile_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = QEFFAutoModelForImageTextToText(multimodal.lively("llava_next"), processor("llava_next"))
    together, compiling = threading.Barrier(2), QEFFAutoModelForImageTextToText._compile

    def waiting(self: Any, *arguments: Any, **rest: Any) -> Any:
        together.wait()
        return compiling(self, *arguments, **rest)

    monkeypatch.setattr(QEFFAutoModelForImageTextToText, "_compile", waiting)
    options: dict[str, Any] = {"target": "onnxruntime", "emit_only": True, "ctx_len": 192, "prefill_seq_len": 8}

    def compiled_for(size: tuple[int, int]) -> list[int]:
        out = tmp_path / str(size[0])
        model.compile(image_size=size, compile_dir=out, **options)
        return json.loads((out / SIDE_FOLDER / FILE).read_text())["sizes"][0]["size"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(compiled_for, [(20, 14), (14, 20)])) == [[20, 14], [14, 20]]


def test_pictures_of_other_prompts_are_told(tmp_path: Path) -> None:
    model = compiled("idefics3", tmp_path)
    images = [pictures("idefics3", [1, 2]), pictures("idefics3", [3])]
    given = processed("idefics3", images, texts("idefics3"))
    drawn = ("pixel_values", "pixel_attention_mask")
    for wrong, message in (
        ({name: given[name][:1] for name in drawn}, "for 1 prompts, and there are 2: give both"),
        ({name: torch.cat([given[name]] * 2) for name in drawn}, "for 4 prompts, and there are 2: give both"),
        ({name: torch.cat([given[name]] * 2, dim=1) for name in drawn}, "more pictures for prompt 1 than the 2"),
    ):
        with pytest.raises(RuntimeInputError, match=message):
            answered(model, **{**given, **wrong})


def test_pixels_of_other_types_are_taken_or_told(llava: QEFFAutoModelForImageTextToText) -> None:
    given = processed("llava", [pictures("llava", [1, 2]), pictures("llava", [3])], texts("llava"))
    pixels = given["pixel_values"]
    rounded = pixels.bfloat16()
    assert answered(llava, **{**given, "pixel_values": rounded}) == answered(
        llava, **{**given, "pixel_values": rounded.float()}
    )
    for wrong, message in (
        ([[1.0], [1.0, 2.0]], "pixel_values is no array"),
        (pixels > 0, "pixel_values is bool, or has numbers that are not finite"),
        (pixels * float("nan"), "pixel_values is float32, or has numbers that are not finite"),
        ("cat.png", "pixel_values is"),
    ):
        with pytest.raises(RuntimeInputError, match=message):
            answered(llava, **{**given, "pixel_values": wrong})
    words = dict(processor("llava").tokenizer(["w5 w6", "w8 w9"], return_tensors="pt", return_token_type_ids=False))
    assert answered(llava, **words, pixel_values=None) == answered(llava, **words)


def test_rows_are_kept_up_to_so_many_bytes(
    llava: QEFFAutoModelForImageTextToText, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = processed("llava", [pictures("llava", [40, 41]), pictures("llava", [42])], texts("llava"))
    right, kept = answered(llava, **given), llava.runner()._rows
    assert len(kept) > 2
    monkeypatch.setattr(picture_runner, "_KEPT", 2 * 16 * 32 * 4)
    other = processed("llava", [pictures("llava", [43, 44]), pictures("llava", [45])], texts("llava"))
    answered(llava, **other)
    assert len(kept) == 2
    assert answered(llava, **given) == right


def test_an_opened_model_is_pickled(llava: QEFFAutoModelForImageTextToText) -> None:
    given = processed("llava", [pictures("llava", [1, 2]), pictures("llava", [3])], texts("llava"))
    right = answered(llava, **given)
    assert answered(pickle.loads(pickle.dumps(llava)), **given) == right


def test_a_form_of_other_pictures_is_told(llava: QEFFAutoModelForImageTextToText, tmp_path: Path) -> None:
    text = (llava.package.folder / SIDE_FOLDER / FILE).read_text()
    known = json.loads(text)
    (size,) = known["sizes"]
    pixels = size["inputs"]["pixel_values"]
    for change, message in (
        ({"sizes": [{**size, "rows": 0}]}, "rows is 0"),
        ({"count": -1}, "count is -1"),
        ({"sizes": [{**size, "size": [20, 0]}]}, "size is 0"),
        ({"sizes": [{**size, "inputs": {}}]}, "there are no inputs"),
        ({"sizes": [{**size, "inputs": {"pixel_values": {**pixels, "axis": 9}}}]}, "axes 9 and"),
        ({"sizes": []}, "the sizes are none, or do not go together"),
        ({"sizes": [size, size]}, "the sizes are none, or do not go together"),
        ({"sizes": [size, {**size, "program": "main"}]}, "the sizes are none, or do not go together"),
        ({"sizes": [size, {**size, "program": "v", "inputs": {"pixels": pixels}}]}, "do not go together"),
    ):
        (tmp_path / FILE).write_text(json.dumps({**known, **change}))
        with pytest.raises(PackageError, match=message):
            PictureForms.read(tmp_path)
    form = llava.runner().forms.sizes[0]
    form.check({"pixel_values": [1, 3, 16, 16]})
    with pytest.raises(PackageError, match="is of other pictures than the encoder takes"):
        form.check({"pixel_values": [1, 3, 16, 8]})


def test_the_context_has_room_for_pictures_and_words(tmp_path: Path) -> None:
    model = multimodal.lively("llava")
    longer = copy.deepcopy(model)
    longer.config.text_config.max_position_embeddings = 4096
    for given, ctx_len in ((longer, 1152), (model, 256)):
        found = QEFFAutoModelForImageTextToText(given, processor("llava"))
        out = tmp_path / str(ctx_len)
        found.compile(image_size=(20, 14), num_images=2, target="onnxruntime", compile_dir=out, emit_only=True)
        assert found.runner().decoder.ctx_len == ctx_len


def test_a_model_in_memory_answers_alike(tmp_path: Path) -> None:
    model = QEFFAutoModelForImageTextToText(multimodal.lively("llava"), processor("llava"))
    model.compile(image_size=PROCESSORS["llava"].size, target="onnxruntime", compile_dir=tmp_path / "out", **SHAPES)
    text, images = texts("llava"), [pictures("llava", [1, 2]), pictures("llava", [3])]
    right = [expected("llava", own, said) for own, said in zip(images, text, strict=True)]
    given = processed("llava", images, text)
    assert answered(model, **given) == right
    again = QEFFAutoModelForImageTextToText.from_package(tmp_path / "out")
    assert answered(again, **given) == right
    with pytest.raises(PackageError, match="cannot be compiled again"):
        again.compile(image_size=(4, 4))


def test_of_a_model_that_also_speaks_what_answers_in_text_is_taken(tmp_path: Path) -> None:
    whole = multimodal.speaking()
    whole.save_pretrained(tmp_path / "model")
    processor("qwen2_5_vl").save_pretrained(tmp_path / "model")
    arguments: dict[str, Any] = {**SHAPES, "image_size": PROCESSORS["qwen2_5_vl"].size, "emit_only": True}
    model = QEFFAutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    model.compile(target="onnxruntime", compile_dir=tmp_path / "out", **arguments)
    text, images = texts("qwen2_5_vl"), [pictures("qwen2_5_vl", [1, 2]), pictures("qwen2_5_vl", [3])]
    alone = processed("qwen2_5_vl", images[:1], text[:1])
    del alone["mm_token_type_ids"]
    right = logits(whole.thinker, **alone)
    again = QEFFAutoModelForImageTextToText.from_package(tmp_path / "out")
    assert again.config.model_type == model.config.model_type == whole.thinker.config.model_type
    for opened in (model, again):
        assert error_over_rms(logits(opened, **processed("qwen2_5_vl", images, text))[0], right[0]) <= LOOSE
    part = PictureSource(Memory(whole, processor("qwen2_5_vl"))).provider
    assert isinstance(part, Memory) and part.model is whole.thinker


@pytest.mark.parametrize(("name", "target", "two"), [("llava", "onnxruntime", True), ("qwen3_vl", "ai100", False)])
def test_the_host_looks_up_the_tokens(name: str, target: str, two: bool, tmp_path: Path) -> None:
    model = QEFFAutoModelForImageTextToText(multimodal.lively(name), processor(name), kv_offload=two)
    options: dict[str, Any] = {**SHAPES, "image_size": PROCESSORS[name].size, "target": target, "emit_only": True}
    model.compile(token_embedding="host", compile_dir=tmp_path, **options)
    names = [port.name for port in model.runner().decoder.session.interface.inputs]
    assert names[:3] == ["inputs_embeds", "input_ids", "position_ids"]  # the tokens tell the places of pictures
    answers_like_transformers(model, name)
    with pytest.raises(PackageError, match="stay in the model's checkpoint: open the package with from_package"):
        QEFFAutoModelForImageTextToText.from_package(tmp_path).runner()
    again = QEFFAutoModelForImageTextToText.from_package(tmp_path, checkpoint=Source(Memory(multimodal.lively(name))))
    given = processed(name, [pictures(name, [1, 2]), pictures(name, [3])], texts(name))
    assert answered(again, **given) == answered(model, **given)


def test_tokens_have_their_pictures_by_either_name(llava: QEFFAutoModelForImageTextToText) -> None:
    given = processed("llava", [pictures("llava", [1, 2]), pictures("llava", [3])], texts("llava"))
    right, ids = answered(llava, **given), given.pop("input_ids")
    assert answered(llava, inputs=ids, input_ids=None, **given) == right
    with pytest.raises(RuntimeInputError, match=r"needs input_ids of shape \[batch, tokens\] .*, not a list"):
        answered(llava, input_ids=ids.tolist(), **given)


def test_a_picture_that_was_seen_is_not_encoded_again(llava: QEFFAutoModelForImageTextToText) -> None:
    runner = llava.runner()
    images = [pictures("llava", [30, 31]), pictures("llava", [30])]
    before = len(runner._rows)
    first = answered(llava, **processed("llava", images, texts("llava")))
    assert len(runner._rows) == before + 2
    assert answered(llava, **processed("llava", images, texts("llava"))) == first


def test_programs_and_what_they_are_for_are_part_of_the_package(
    llava: QEFFAutoModelForImageTextToText, tmp_path: Path
) -> None:
    folder = llava.package.folder
    assert list(open_package(folder).programs) == [MAIN, "vision"]
    again = QEFFAutoModelForImageTextToText.from_pretrained(folder.parent / "model")
    arguments: dict[str, Any] = {"target": "onnxruntime", "compile_dir": folder, "emit_only": True}
    again.compile(image_size=PROCESSORS["llava"].size, **arguments, **SHAPES)
    assert again.package.cached
    fewer: dict[str, Any] = {**arguments, **SHAPES, "compile_dir": tmp_path, "num_images": 1}
    again.compile(image_size=PROCESSORS["llava"].size, **fewer)
    assert again.package.manifest.key != llava.package.manifest.key
    form = json.loads((folder / SIDE_FOLDER / FILE).read_text())
    assert (form["sizes"][0]["rows"], form["count"], form["token"]) == (16, 2, multimodal.IMAGE)
    (tmp_path / SIDE_FOLDER / FILE).write_text("{}")
    with pytest.raises(PackageError, match="was altered"):
        QEFFAutoModelForImageTextToText.from_package(tmp_path)


def test_requests_that_do_not_fit_are_told(llava: QEFFAutoModelForImageTextToText) -> None:
    text, images = texts("llava"), [pictures("llava", [1, 2]), pictures("llava", [3])]
    given = processed("llava", images, text)
    without = {name: value for name, value in given.items() if name != "pixel_values"}
    three = processed("llava", [pictures("llava", [1, 2, 3]), []], ["<image> <image> w4 <image>", "w5"])
    cut = {**given, **{name: given[name][:, 3:] for name in ("input_ids", "attention_mask")}}
    for wrong, message in (
        (without, r"placeholders for 3 pictures, and 'pixel_values' is missing"),
        ({**given, "pixel_values": given["pixel_values"][:2]}, r"pixel_values is \[2, 3, 16, 16\]"),
        ({**given, "pixel_values": given["pixel_values"][..., :8]}, r"of the compiled size \(20 x 14\) gives"),
        (three, r"a prompt has 3 pictures, the model is compiled for 2: compile with num_images=3"),
        ({**given, "input_ids": given["input_ids"].where(given["input_ids"] != multimodal.IMAGE, 5)}, "no placeholder"),
        (cut, "placeholders, and a picture of the compiled size"),
        ({**given, "pixel_value": 5}, r"does not take pixel_value"),
    ):
        with pytest.raises(RuntimeInputError, match=message):
            answered(llava, **wrong)
    assert answered(llava, **given) == [expected("llava", own, said) for own, said in zip(images, text, strict=True)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("llava_next", "makes other inputs of a picture of 20 x 14 .* give the model's own processor"),
        ("idefics3", "makes other inputs of a picture of 20 x 14 .* give the model's own processor"),
        ("qwen2_5_vl", "a picture is 24 x 16, and the model is compiled for 20 x 14"),
    ],
)
def test_a_processor_of_another_model_is_told(llava: QEFFAutoModelForImageTextToText, other: str, message: str) -> None:
    text, images = texts(other)[1], pictures(other, [3])
    with pytest.raises(RuntimeInputError, match=message):
        llava.generate(prompts=[text], images=[images], processor=processor(other), max_new_tokens=1)
    with pytest.raises(RuntimeInputError, match="placeholders, and a picture of the compiled size"):
        answered(llava, **processed(other, [images], [text]))


def test_what_cannot_be_compiled_is_told(llava: QEFFAutoModelForImageTextToText, tmp_path: Path) -> None:
    folder = llava.package.folder.parent / "model"
    with pytest.raises(ModelLoadError, match="kv_offload is None: give True for a vision and a language program"):
        QEFFAutoModelForImageTextToText.from_pretrained(folder, kv_offload=None)  # pyright: ignore[reportArgumentType]
    model = QEFFAutoModelForImageTextToText.from_pretrained(folder)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"image_size": (0, 4)}, "image_size is"),
        ({"image_size": "large"}, "image_size is 'large'"),
        ({"image_size": []}, r"image_size is \[\]"),
        ({"image_size": [(16, 16), (16,)]}, "image_size is"),
        ({"image_size": (16, 16), "num_images": 0}, "num_images must be"),
        ({"image_size": (16, 16), "token_embedding": "card"}, "token_embedding is 'card': give 'graph' or 'host'"),
        ({"image_size": (16, 16), "num_videos": 2}, "a package is for pictures or for videos: give num_images, or num"),
        ({"image_size": (16, 16), "num_images": 8, "ctx_len": 128}, "8 pictures of 16 x 16 take up to 128 tokens"),
    )
    for arguments, message in wrong:
        with pytest.raises(CompileError, match=message):
            model.compile(**arguments)
    with pytest.raises(ModelLoadError, match="the processor is of type NoneType"):
        QEFFAutoModelForImageTextToText(multimodal.lively("llava"), None)
    support.tiny("llama")[1].save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not load"):
        QEFFAutoModelForImageTextToText.from_pretrained(tmp_path).compile(image_size=(16, 16))
