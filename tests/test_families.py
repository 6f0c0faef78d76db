"""Families of models with image processors and chat templates of their own: pictures of five sizes, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qeff_ir import QEFFAutoModelForImageTextToText
from qeff_ir.numerics import error_over_rms
from tests import families, processors, support
from tests.families import FAMILIES, SIZES
from tests.test_image_text import LOOSE

NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
CI = ("aya_vision",)
"""Families of CI, beside those of `tests.test_image_text`."""


def processed(name: str, images: list[Any], text: str) -> dict[str, Any]:
    """What the processor makes of what the chat template makes of a prompt."""
    processor = families.processor(name)
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return dict(processor(images=[images], text=[_template(processor, content)], return_tensors="pt"))


def expected(name: str, images: list[Any], text: str) -> list[int]:
    """transformers' greedy answer."""
    return support.generate(families.lively(name), **processed(name, images, text), **GREEDY)[0, -NEW:].tolist()


def logits(name: str, given: dict[str, Any]) -> Any:
    """transformers' logits of the first new token."""
    options: dict[str, Any] = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False, "output_logits": True}
    model: Any = families.lively(name)
    return model.generate(**given, **options, return_dict_in_generate=True).logits[0][0].numpy()


def _template(processor: Any, content: list[dict[str, str]]) -> str:
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def compiled(name: str, out: Path, target: str = "onnxruntime") -> QEFFAutoModelForImageTextToText:
    model = QEFFAutoModelForImageTextToText(families.lively(name), families.processor(name))
    model.compile(
        image_size=SIZES, target=target, compile_dir=out, prefill_seq_len=64, ctx_len=224, batch_size=1, num_images=2,
        emit_only=True,
    )  # fmt: skip
    return model


@pytest.mark.parametrize(
    "name", [name if name in CI else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]
)
def test_pictures_of_five_sizes_are_answered_as_by_transformers(name: str, tmp_path: Path) -> None:
    model, processor = compiled(name, tmp_path), families.processor(name)
    found, right, first = list[list[int]](), list[list[int]](), list[Any]()
    for number, size in enumerate(SIZES):
        image = Image.fromarray(processors.picture(size, number))
        answer = model.generate(prompts="w5 w6", images=[image], processor=processor, **GREEDY)
        found += answer.generated_ids
        right.append(expected(name, [image], "w5 w6"))
        first.append(logits(name, processed(name, [image], "w5 w6")))
        own = model.runner().last_of_prompts(["w5 w6"], [[image]], processor, resize=False)[0]
        assert error_over_rms(own, first[-1]) <= LOOSE
    assert found == right
    assert min(error_over_rms(first[0], other) for other in first[1:]) > 10 * LOOSE  # pictures are seen
    images = [Image.fromarray(processors.picture(size, 7)) for size in (SIZES[1], SIZES[3])]
    answer = model.generate(prompts="w9", images=images, processor=processor, **GREEDY)
    assert answer.generated_ids == [expected(name, images, "w9")]
