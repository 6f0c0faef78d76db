"""Prompts about pictures, as a model's processor and chat template take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from qeff_ir.errors import RuntimeInputError, first_line
from qeff_ir.runtime.picture_form import PictureForm
from qeff_ir.runtime.picture_forms import PictureForms


def pictures_of(images: object, count: int) -> list[list[Any]]:
    """The pictures of each of `count` prompts.

    Args:
        images: A list of pictures for each prompt; also one picture for each, or all pictures of the only prompt.
        count: How many prompts there are.

    Raises:
        RuntimeInputError: They are of another number of prompts.
    """
    if images is None:
        return [[] for _ in range(count)]
    given = list(cast("Sequence[Any]", images)) if isinstance(images, list | tuple) else [images]
    if given and all(isinstance(one, list | tuple) for one in given):
        found = [list(cast("Sequence[Any]", one)) for one in given]
    else:
        found = [given] if count == 1 else [[one] for one in given]
    if len(found) != count:
        raise RuntimeInputError(
            f"there are pictures for {len(found)} prompts, and {count} prompts: give a list for each"
        )
    return found


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor of pictures and text.

    Raises:
        RuntimeInputError: It is something else.
    """
    found = getattr(processor, "tokenizer", None)
    if not callable(processor) or found is None:
        raise RuntimeInputError(
            f"the processor is of type {type(processor).__name__}, without a tokenizer: give that of the model, as "
            "AutoProcessor.from_pretrained returns it"
        )
    return found


def fitting(forms: PictureForms, processor: Any, picture: Any, *, resize: bool) -> tuple[Any, PictureForm]:
    """The picture, which has a compiled size, or is resized to the nearest (in shape, then in area); and its size.

    Args:
        forms: The sizes.
        processor: The model's.
        picture: A picture.
        resize: Whether to resize it.

    Raises:
        RuntimeInputError: It has none of them, and is not to be resized, or cannot be.
    """
    made = _called(getattr(processor, "image_processor", processor), "the picture", images=[[picture]])
    arrays = {name: np.asarray(value) for name, value in made.items() if name in forms.inputs}
    found = forms.of(arrays)
    if found is not None:
        return picture, found
    image = _image(picture)
    if any(form.size == (image.height, image.width) for form in forms.sizes):
        raise RuntimeInputError(
            f"the processor makes other inputs of a picture of {image.height} x {image.width} than the model was "
            "compiled for: give the model's own processor"
        )
    if not resize:
        raise RuntimeInputError(
            f"a picture is {image.height} x {image.width}, and the model is compiled for {forms.said}: pass "
            "resize=True (--resize), or compile with its image_size"
        )
    nearest = min(forms.sizes, key=lambda form: _change(image, *form.size))
    return image.convert("RGB").resize(nearest.size[::-1]), nearest


def _change(image: Any, height: int, width: int) -> tuple[float, float]:
    """How much another size changes a picture: in shape, by tenths, then in area."""
    tall, wide = math.log(height / image.height), math.log(width / image.width)
    return round(abs(tall - wide), 1), abs(tall + wide)


def _image(picture: Any) -> Any:
    """A picture as Pillow has it.

    Raises:
        RuntimeInputError: It is something else.
    """
    from PIL import Image

    try:
        return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    except (TypeError, AttributeError) as error:
        kind = type(picture).__name__
        raise RuntimeInputError(
            f"a picture is of type {kind}: give one of Pillow, or an array uint8 [h, w, 3]"
        ) from error


def processed(processor: Any, prompt: str, pictures: Sequence[Any]) -> dict[str, Any]:
    """What a processor makes of a prompt about pictures, or about none; of a beginning-of-text token, one.

    Raises:
        RuntimeInputError: It does not take the prompt.
    """
    text, first = asked(processor, prompt, len(pictures)), getattr(tokenizer_of(processor), "bos_token", None)
    given: dict[str, Any] = {"images": [list(pictures)]} if pictures else {}
    if first and text.startswith(first):  # as many chat templates do
        given["add_special_tokens"] = False
    return _called(processor, "the prompt and its pictures", text=[text], **given)


def _called(processor: Any, what: str, **given: Any) -> dict[str, Any]:
    try:
        return dict(processor(return_tensors="pt", **given))
    except Exception as error:  # processors raise whatever their many steps raise
        raise RuntimeInputError(
            f"the processor does not take {what} ({first_line(error)}): give them as the model's card has them"
        ) from error


def place_of(processor: Any) -> str:
    """What stands in a prompt for a picture."""
    return getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or "<image>"


def asked(processor: Any, prompt: str, count: int) -> str:
    """A prompt with a place for each picture: as it was written, or by the model's chat template.

    A prompt without places has them in front where there is no template.

    Raises:
        RuntimeInputError: The template fails.
    """
    place = place_of(processor)
    if place in prompt:
        return prompt
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": prompt}]
        try:
            return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        except Exception as error:  # templates are code of the model's
            raise RuntimeInputError(
                f"the chat template of the processor does not take a prompt with {count} pictures "
                f"({first_line(error)}): write the prompt with {place!r} for each picture"
            ) from error
    return " ".join([place] * count + [prompt])
