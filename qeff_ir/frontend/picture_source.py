"""Models of pictures and text: a package has an encoder, and a language model given rows.

Asked for a single program, it has both in one graph.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qeff_ir.errors import CompileError, QeffError, UnsupportedModelError, first_line
from qeff_ir.frontend.checkpoint.config import CONFIG
from qeff_ir.frontend.headless import fill_head
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.tasks import IMAGE_TEXT_TO_TEXT
from qeff_ir.ir.module import Module
from qeff_ir.package import MAIN
from qeff_ir.runtime.picture_form import InputForm, PictureForm, form_of_inputs
from qeff_ir.runtime.picture_forms import PictureForms, check_alike

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qeff_ir.frontend.checkpoint.weights import Weights
    from qeff_ir.frontend.export.encoders import Example
    from qeff_ir.frontend.export.features import Features
    from qeff_ir.frontend.providers.provider import Provider

Modality = Literal["image", "video"]
"""What is encoded beside text; the frames of a video are encoded together."""

VISION = "vision"
"""The program that encodes pictures; the main one is the language model (AI 100 contract §1.8).

Of several sizes, each has a program of its own, with the size in its name: places, windows and masks of a size are
constants of its graph, and two sizes may differ in nodes, so they are not specializations of one graph (§1.9).
"""


@dataclass(frozen=True)
class Pictured:
    """What a model is compiled for, beside text.

    Attributes:
        forms: What a processor makes of pictures of each size.
        examples: Just that, for a picture of noise, by the program that encodes it.
        features: What the encoder makes of a picture of the size with the most rows.
        whole: What the processor makes of the pictures of a whole batch, for a single program; `None` for several.
    """

    forms: PictureForms
    examples: Mapping[str, Example]
    features: Features
    whole: Example | None = None


class PictureSource(Source):
    """A model of pictures and text, see `for_pictures`; its provider has its processor.

    Of a model that answers in other ways too, the part that answers in text is taken.

    Args:
        provider: Where it comes from.
        headless: Whether its LM head is not read, so that a checkpoint may lack it.

    Attributes:
        single_program: Whether encoder and language model are one program.
    """

    pictured: Pictured | None = None
    single_program: bool = False

    def __init__(self, provider: Provider, *, headless: bool = False) -> None:
        from qeff_ir.frontend.parts import answering_part

        part = answering_part(provider, IMAGE_TEXT_TO_TEXT.auto_class())
        super().__init__(part, IMAGE_TEXT_TO_TEXT)
        self._is_part, self._headless = part is not provider, headless

    def opened(self) -> tuple[PreTrainedModel, Weights]:
        """See `Source.opened`; an LM head that is not read has the weight of the embeddings."""
        model, weights = self.provider.opened(self.auto_class(), partial=self._headless)
        return model, fill_head(model, weights) if self._headless else weights

    def programs(self) -> Mapping[str, Callable[[], Module]]:
        """See `Source.programs`."""
        if self.single_program:
            return {MAIN: self.lower}
        encoders = {name: functools.partial(self.lower_vision, name) for name in self._known().examples}
        return {MAIN: self.lower, **encoders}

    def for_pictures(
        self, sizes: Sequence[tuple[int, int]], count: int, batch: int = 1, frames: int = 0
    ) -> PictureSource:
        """The model, to be compiled for up to `count` pictures of these sizes (height and width) in a prompt.

        Sizes of which the image processor makes the same are one.

        Args:
            sizes: The sizes.
            count: Pictures of a prompt.
            batch: Prompts of a run, whose pictures a single program encodes together.
            frames: Of videos in the place of pictures: how many each has.

        Raises:
            CompileError: The image processor does not take such pictures, or there are several sizes for a single
                program.
            UnsupportedModelError: The model has no encoder of its own, or makes rows of another kind for each size.
        """
        from qeff_ir.frontend.export.encoders import find_features
        from qeff_ir.frontend.export.features import encoder_of

        model, modality = self.opened()[0], _modality(frames)
        takes = inspect.signature(encoder_of(model, modality)).parameters
        token = getattr(self.config, f"{modality}_token_id", None)
        if not isinstance(token, int):
            raise UnsupportedModelError(
                f"the configuration of {type(model).__name__} has no {modality}_token_id: no token stands for a "
                f"{'video' if frames else 'picture'}"
            )
        if frames and self.single_program:
            raise CompileError("one program for pictures and text takes no videos: leave out kv_offload=False")
        processor = self.provider.processor_of("AutoVideoProcessor" if frames else "AutoImageProcessor")
        found: list[tuple[PictureForm, Example, Features]] = []
        for size in sizes:
            example, inputs = _example(processor, size, takes, frames)
            if not example:
                raise CompileError(f"{type(processor).__name__} makes nothing that {type(model).__name__} takes")
            if all(form.inputs != inputs for form, _, _ in found):
                features = find_features(model, example, modality)
                form = PictureForm(f"{VISION}_{size[0]}x{size[1]}", size, features.rows, inputs, frames)
                found.append((form, example, features))
        if len(found) == 1:
            found = [(replace(found[0][0], program=MAIN if self.single_program else VISION), *found[0][1:])]
        elif self.single_program:
            raise CompileError(
                f"one program for pictures and text takes pictures of one size, and {len(found)} are asked for: leave "
                "out kv_offload=False (--single-program)"
            )
        if len({replace(features, rows=1) for _, _, features in found}) > 1:
            raise UnsupportedModelError(
                f"the encoder of {type(model).__name__} makes rows of another kind for each size of pictures: compile "
                "for each by itself"
            )
        beside = _beside(model, takes) if frames else ()
        forms = PictureForms(token, count, tuple(form for form, _, _ in found), beside)
        check_alike(forms.sizes)
        largest = max((features for _, _, features in found), key=lambda features: features.rows)
        whole = _of_batch(processor, forms, batch, takes) if self.single_program else None
        made = copy.copy(self)
        made.pictured = Pictured(forms, {form.program: example for form, example, _ in found}, largest, whole)
        return made

    def _known(self) -> Pictured:
        if self.pictured is None:
            raise CompileError("the size of the pictures is not known: give image_size=(height, width)")
        return self.pictured

    def lower(self) -> Module:
        """Lower the language model, with the encoder in a single program; see `Source.lower`."""
        from qeff_ir.frontend.export.encoders import lower_encoder
        from qeff_ir.frontend.export.pictures import lower_language
        from qeff_ir.frontend.export.single_program import join

        model, weights = self.opened()
        known = self._known()
        largest = next(form for form in known.forms.sizes if form.rows == known.features.rows)
        example = known.examples[largest.program]
        modality, count = _modality(largest.frames), known.forms.count
        language = lower_language(model, weights, known.features, modality, count, example)
        if known.whole is None:
            return language
        _, pixels = largest.pixels
        batched = pixels.row_axis == 0 and (pixels.axis != 0 or pixels.step * known.forms.count == 1)
        return join(language, lower_encoder(model, weights, known.whole), batched=batched)

    def lower_vision(self, program: str) -> Module:
        """Lower the encoder of one size of pictures, by its name; see `Source.lower`."""
        from qeff_ir.frontend.export.encoders import lower_encoder

        modality = _modality(self._known().forms.sizes[0].frames)
        return lower_encoder(*self.opened(), self._known().examples[program], modality)

    def save_side_files(self, folder: Path) -> None:
        """See `Source.save_side_files`; with the forms of pictures, by which they are part of the package's key.

        The configuration is that of the part that is taken.
        """
        super().save_side_files(folder)
        if self._is_part:
            self.config.to_json_file(folder / CONFIG)
        self._known().forms.write(folder)


def _modality(frames: int) -> Modality:
    return "video" if frames else "image"


def _beside(model: PreTrainedModel, takes: Collection[str]) -> tuple[str, ...]:
    """What a model wants to know of each video to tell where its tokens are, beside what its encoder takes."""
    places = getattr(model.base_model, "get_rope_index", None)
    known = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", *takes)
    names = [] if places is None else list(inspect.signature(places).parameters)
    return tuple(name for name in names if name not in known and name != "kwargs")


def _example(
    processor: Any, size: tuple[int, int], takes: Collection[str], frames: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, InputForm]]:
    """What an image processor makes of a picture of noise, of that what an encoder takes, and how it lies there.

    A video has `frames` of them.
    """
    random = np.random.default_rng(0)
    shape = (frames, *size, 3) if frames else (*size, 3)
    noise = [random.integers(0, 256, shape, dtype=np.uint8) for _ in range(2)]
    one, pair, rows = (
        {name: value for name, value in _processed(processor, nested).items() if name in takes}
        for nested in ([noise[:1]], [noise], [noise[:1], noise[1:]])
    )
    arrays = [{name: value.numpy() for name, value in made.items()} for made in (one, pair, rows)]
    return one, form_of_inputs(*arrays)


def _of_batch(processor: Any, forms: PictureForms, batch: int, takes: Collection[str]) -> dict[str, torch.Tensor]:
    """What an image processor makes of as many pictures of noise as a batch may have, of that what an encoder takes."""
    random = np.random.default_rng(0)
    size = (batch, forms.count, *forms.sizes[0].size, 3)
    noise = random.integers(0, 256, size, dtype=np.uint8)
    return {n: v for n, v in _processed(processor, [list(row) for row in noise]).items() if n in takes}


def _processed(processor: Any, images: list[list[Any]]) -> dict[str, torch.Tensor]:
    """What an image processor makes of the pictures of several prompts.

    Raises:
        CompileError: It does not take them.
    """
    import torch

    height, width = images[0][0].shape[-3:-1]
    videos = images[0][0].ndim == 4
    try:
        # A video has the frames that the encoder sees: none is left out, and prompts do not tell which is whose.
        given = (
            {"videos": [one for own in images for one in own], "do_sample_frames": False}
            if videos
            else {"images": images}
        )
        made: Mapping[str, Any] = processor(return_tensors="pt", **given)
        return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    except QeffError:
        raise
    except Exception as error:  # processors raise whatever their many steps raise
        what, other = ("video of frames", "image_size or num_frames") if videos else ("picture", "image_size")
        raise CompileError(
            f"{type(processor).__name__} does not take a {what} of {height} x {width} ({first_line(error)}): give "
            f"another {other}"
        ) from error
