"""Pictures of several compiled sizes in one prompt, and prompts with pictures instead of a processor's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qeff_ir import QEFFAutoModelForImageTextToText
from qeff_ir.errors import RuntimeInputError
from qeff_ir.package import MAIN, open_package
from qeff_ir.runtime.picture_form import InputForm, PictureForm
from qeff_ir.runtime.picture_forms import PictureForms
from qeff_ir.runtime.picture_prompts import fitting, processed
from tests import multimodal, processors, support
from tests.multimodal import IMAGE
from tests.processors import PROCESSORS

NEW = 6
SIZES = {"llava_next": [(20, 14), (14, 40)], "qwen2_5_vl": [(24, 16), (16, 16)], "idefics3": [(32, 32), (32, 16)]}
SHAPES: dict[str, Any] = {"prefill_seq_len": 8, "ctx_len": 192, "batch_size": 2, "num_images": 2, "emit_only": True}
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(processors.picture(size, seed))


def compiled(name: str, out: Path, sizes: Any, target: str = "onnxruntime") -> QEFFAutoModelForImageTextToText:
    model = QEFFAutoModelForImageTextToText(multimodal.lively(name), processors.processor(name))
    model.compile(image_size=sizes, target=target, compile_dir=out, **SHAPES)
    return model


def expected(name: str, images: list[Any], text: str) -> list[int]:
    """transformers' greedy answer to one prompt."""
    given = dict(processors.processor(name)(images=[images], text=[text], return_tensors="pt"))
    return support.generate(multimodal.lively(name), **given, **GREEDY)[0, -NEW:].tolist()


@pytest.mark.parametrize(
    ("name", "target"), [("llava_next", "onnxruntime"), ("qwen2_5_vl", "ai100"), ("idefics3", "onnxruntime")]
)
def test_a_prompt_has_pictures_of_several_sizes(name: str, target: str, tmp_path: Path) -> None:
    first, second = SIZES[name]
    model = compiled(name, tmp_path, SIZES[name], target)
    programs = [MAIN, *sorted(f"vision_{height}x{width}" for height, width in SIZES[name])]
    assert list(open_package(tmp_path).programs) == programs
    rows = [form.rows for form in model.runner().forms.sizes]
    assert rows[0] != rows[1]
    place = PROCESSORS[name].place
    text = [f"w5 w6 {place} w7 w8 {place} w10 w11", f"{place} w12 w13 w14"]
    images = [[picture(first, 1), picture(second, 2)], [picture(second, 3)]]
    if name == "idefics3":  # whose tiles say nothing of their order
        images[0][1] = picture(first, 2)
    right = [expected(name, own, said) for own, said in zip(images, text, strict=True)]
    given = dict(processors.processor(name)(images=images, text=text, return_tensors="pt", padding=True))
    assert model.generate(**given, **GREEDY)[:, -NEW:].tolist() == right
    answer = model.generate(prompts=text, images=images, processor=processors.processor(name), **GREEDY)
    assert answer.generated_ids == right
    other = [expected(name, [images[1][0]], text[1]), expected(name, [picture(first, 3)], text[1])]
    assert other[0] == right[1] != other[1]


def test_sizes_of_which_a_processor_makes_the_same_are_one(tmp_path: Path) -> None:
    model = compiled("llava", tmp_path, [(20, 14), (100, 30)])
    assert list(open_package(tmp_path).programs) == [MAIN, "vision"]
    assert [form.size for form in model.runner().forms.sizes] == [(20, 14)]


def test_pictures_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    model = compiled("idefics3", tmp_path, SIZES["idefics3"])
    text = f"{PROCESSORS['idefics3'].place} w7 {PROCESSORS['idefics3'].place}"
    images = [picture(size, seed) for seed, size in enumerate(SIZES["idefics3"])]
    given = dict(processors.processor("idefics3")(images=[images] * 2, text=[text] * 2, return_tensors="pt"))
    with pytest.raises(RuntimeInputError, match=r"of prompt 1 can be read as such of several compiled sizes \(32 x 32"):
        model.generate(**given, **GREEDY)
    for own in (images, images[::-1]):  # pictures themselves tell
        answer = model.generate(prompts=text, images=own, processor=processors.processor("idefics3"), **GREEDY)
        assert answer.generated_ids == [expected("idefics3", own, text)]


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> QEFFAutoModelForImageTextToText:
    return compiled("qwen2_5_vl", tmp_path_factory.mktemp("grids"), SIZES["qwen2_5_vl"])


def test_any_number_of_prompts_is_answered(grids: QEFFAutoModelForImageTextToText) -> None:
    processor, sizes = processors.processor("qwen2_5_vl"), SIZES["qwen2_5_vl"]
    images = [[picture(sizes[0], 1)], [], [picture(sizes[1], 2), picture(sizes[0], 3)]]
    prompts = ["w5 w6", "w7 w8 w9", "<image> w4 <image> w10"]
    answer = grids.generate(prompts=prompts, images=images, processor=processor, **GREEDY)
    texts = ["<image> w5 w6", "w7 w8 w9", prompts[2]]
    right = [expected("qwen2_5_vl", own, text) for own, text in zip(images, texts, strict=True)]
    assert answer.generated_ids == right
    assert answer.generated_texts == [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in right]
    assert len(answer.timings) == 2
    assert all(timing.tokens for timing in answer.timings)
    # One for each, and all of the only one; arrays too.
    flat = [np.asarray(own[0]) for own in (images[0], images[2])]
    both = grids.generate(prompts=["w5 w6", "w10"], images=flat, processor=processor, **GREEDY).generated_ids
    assert both == [right[0], expected("qwen2_5_vl", [flat[1]], "<image> w10")]
    alone = grids.generate(prompts=prompts[2], images=images[2], processor=processor, **GREEDY).generated_ids
    assert alone == [right[2]]


def test_a_picture_of_no_compiled_size_is_told_or_resized(grids: QEFFAutoModelForImageTextToText) -> None:
    processor, wide = processors.processor("qwen2_5_vl"), picture((40, 64), 4)
    given: dict[str, Any] = {"prompts": "w5", "processor": processor, **GREEDY}
    for image in (wide, np.asarray(wide)):
        with pytest.raises(
            RuntimeInputError, match=r"a picture is 40 x 64, and the model is compiled for 24 x 16, 16 x"
        ):
            grids.generate(images=image, **given)
        answer = grids.generate(images=image, resize=True, **given)
        assert answer.generated_ids == [expected("qwen2_5_vl", [wide.resize((16, 16))], "<image> w5")]
    tall = picture((64, 40), 5)
    answer = grids.generate(images=tall, resize=True, **given)
    assert answer.generated_ids == [expected("qwen2_5_vl", [tall.resize((16, 24))], "<image> w5")]
    made = dict(processor(images=[[wide]] * 2, text=["<image> w5"] * 2, return_tensors="pt"))
    with pytest.raises(RuntimeInputError, match=r"of prompt 1, which has \d+ placeholders, are not of the compiled"):
        grids.generate(**made, **GREEDY)


class Padding:
    """A processor that fills up each text by itself."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.tokenizer, self.image_processor = inner, inner.tokenizer, inner.image_processor

    def __call__(self, **given: Any) -> dict[str, Any]:
        made = self.inner(**given)
        filled = ("input_ids", "attention_mask", "mm_token_type_ids")
        return {**made, **{name: torch.nn.functional.pad(made[name], (3, 0)) for name in filled}}


def test_padding_of_a_processor_is_no_text(grids: QEFFAutoModelForImageTextToText) -> None:
    image = picture(SIZES["qwen2_5_vl"][0], 1)
    given: dict[str, Any] = {"prompts": ["w5 <image> w6", "w7"], "images": [[image], []], **GREEDY}
    processor = processors.processor("qwen2_5_vl")
    answer = grids.generate(processor=Padding(processor), **given).generated_ids
    assert answer == [expected("qwen2_5_vl", [image], "w5 <image> w6"), expected("qwen2_5_vl", [], "w7")]


@pytest.mark.parametrize("template", ["{{ messages[0].content + 3 }}", "{{ raise_exception('no') }}", "{% for"])
def test_a_chat_template_that_fails_is_told(template: str) -> None:
    processor = processors.processor("llava")
    processor.chat_template = template
    with pytest.raises(
        RuntimeInputError, match=r"chat template .* with 1 pictures \(.*\): write the prompt with '<image"
    ):
        processed(processor, "w5", [picture((20, 14), 1)])
    assert processed(processor, "<image> w5", [picture((20, 14), 1)])["input_ids"].shape[1] > 2


@pytest.mark.parametrize(
    ("size", "nearest"), [((100, 98), (64, 65)), ((20, 21), (16, 16)), ((90, 44), (80, 40)), ((9, 30), (20, 40))]
)
def test_the_nearest_size_has_the_shape_and_then_the_area(size: tuple[int, int], nearest: tuple[int, int]) -> None:
    inputs = {"pixel_values": InputForm((1, 1), None, 0, 0)}
    sizes = ((16, 16), (64, 65), (40, 20), (80, 40), (20, 40))
    forms = PictureForms(IMAGE, 1, tuple(PictureForm(f"vision_{n}", own, 1, inputs) for n, own in enumerate(sizes)))
    found, form = fitting(forms, processors.processor("llava"), picture(size, 1), resize=True)
    assert (found.height, found.width) == nearest == form.size


def test_prompts_that_do_not_fit_are_told(grids: QEFFAutoModelForImageTextToText) -> None:
    processor, small = processors.processor("qwen2_5_vl"), picture(SIZES["qwen2_5_vl"][1], 1)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"prompts": ["w5", "w6"], "images": [[small]]}, "pictures for 1 prompts, and 2 prompts"),
        ({"prompts": "w5", "images": "cat.png"}, "does not take the picture|a picture is of type str"),
        ({"prompts": "w5", "images": [small] * 3}, "a prompt has 3 pictures, the model is compiled for 2"),
        ({"prompts": "w5", "processor": None}, "prompts need processor="),
        ({"prompts": "w5", "processor": processor.tokenizer}, "is of type TokenizersBackend, without a tokenizer"),
        ({"prompts": "w5", "images": [small], "processor": processor.image_processor}, "without a tokenizer"),
        ({"prompts": "w5", "processor": 5}, "is of type int, without a tokenizer"),
        ({"prompts": "w5", "attention_mask": [[1]]}, "prompts cannot be combined with attention_mask"),
        ({"prompts": "<image> w5", "images": []}, "'pixel_values' is missing|does not take the prompt"),
        ({"prompts": "<image> w5", "images": [small, small]}, "more pictures than the text|does not take the prompt"),
        ({"prompts": "<image> <image> w5", "images": [small, small]}, "cannot tell where .* shape mismatch"),
        ({"images": [small], "input_ids": [[5]]}, "images is for prompts, and there are none"),
        ({"images": None, "processor": None, "resize": True}, "resize is for prompts, and there are none"),
    )
    for given, message in wrong:
        with pytest.raises(RuntimeInputError, match=message):
            grids.generate(**{"processor": processor, **GREEDY, **given})
