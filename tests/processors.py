"""Tiny processors of the models in `tests.multimodal`: transformers' own, over a vocabulary of a hundred words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.multimodal import IMAGE, VOCAB


@dataclass(frozen=True)
class TinyProcessor:
    """A processor.

    Attributes:
        kind: Class of the processor.
        images: Class of the image processor.
        sizes: Its arguments.
        arguments: Of the processor itself.
        place: What stands in a text for a picture.
        size: Height and width of the pictures to compile for.
        special: Further tokens by name, see `tokenizer`.
    """

    kind: str
    images: str
    sizes: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    place: str = "<image>"
    size: tuple[int, int] = (20, 14)
    special: dict[str, str] = field(default_factory=dict[str, str])


_SQUARE: dict[str, Any] = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
_GRID: dict[str, Any] = {
    "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024},
}  # fmt: skip
_LLAVA: dict[str, Any] = {
    "patch_size": 4,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}

PROCESSORS: dict[str, TinyProcessor] = {
    "llava": TinyProcessor("LlavaProcessor", "CLIPImageProcessorPil", _SQUARE, _LLAVA),
    "llava_next": TinyProcessor(
        "LlavaNextProcessor",
        "LlavaNextImageProcessorPil",
        {**_SQUARE, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]},
        _LLAVA,
    ),
    "gemma3": TinyProcessor(
        "Gemma3Processor",
        "Gemma3ImageProcessorPil",
        {"size": {"height": 16, "width": 16}},
        {"image_seq_length": 4},
        "<boi>",
        special={"boi_token": "<boi>", "eoi_token": "<eoi>"},
    ),
    "qwen2_5_vl": TinyProcessor("", "Qwen2VLImageProcessorPil", _GRID, size=(24, 16)),
    "qwen3_vl": TinyProcessor("", "Qwen2VLImageProcessorPil", _GRID, size=(16, 24)),
    "idefics3": TinyProcessor(
        "Idefics3Processor",
        "Idefics3ImageProcessorPil",
        {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        {"image_seq_len": 4},
    ),
}  # fmt: skip


def tokenizer(special: dict[str, str]) -> Any:
    """One word, one token; the words are ``w4`` to ``w89``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(4, IMAGE)}
    marks = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "<image>": IMAGE, "<boi>": 92, "<eoi>": 93}
    marks["<fake_token_around_image>"] = 94
    more = {f"<extra{n}>": n for n in (91, *range(95, VOCAB))}
    made = Tokenizer(models.WordLevel({**words, **marks, **more}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    own = {"image_token": "<image>", "fake_token": "<fake_token_around_image>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=own, **names)


def processor(name: str) -> Any:
    """The processor of a tiny model."""
    import transformers
    from transformers.models.auto import image_processing_auto

    case = PROCESSORS[name]
    kind: Any = image_processing_auto.get_image_processor_class_from_name(case.images)
    images = kind(**case.sizes)
    if not case.kind:
        return OfGrids(images, tokenizer(case.special))
    return getattr(transformers, case.kind)(image_processor=images, tokenizer=tokenizer(case.special), **case.arguments)


class OfGrids:
    """What stands in for a processor whose video processor needs torchvision: pictures and text, and no more."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: list[list[Any]] | None = None, text: Any = (), **kwargs: Any) -> dict[str, Any]:
        """Both as tensors; each ``<image>`` is as many tokens as its grid has places."""
        made = dict(self.image_processor(images=images, return_tensors="pt")) if images and any(images) else {}
        grids = iter(made["image_grid_thw"].prod(-1).tolist() if made else ())
        merged = self.image_processor.merge_size**2
        texts = [
            " ".join(" <image>" * (next(grids) // merged) if w == "<image>" else w for w in t.split()) for t in text
        ]
        found = dict(self.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
        return {**found, **made, "mm_token_type_ids": (found["input_ids"] == IMAGE).long()}

    def save_pretrained(self, folder: Any) -> None:
        """Both into a folder."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def picture(size: tuple[int, int], seed: int) -> np.ndarray[Any, Any]:
    """A picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
