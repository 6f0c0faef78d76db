"""Tiny processors of the models in `tests.multimodal`: transformers' own, over a vocabulary of a hundred words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.multimodal import IMAGE, VIDEO, VOCAB


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
    marks = {
        "<pad>": 0,
        "<bos>": 1,
        "<eos>": 2,
        "<unk>": 3,
        "<image>": IMAGE,
        "<video>": VIDEO,
        "<boi>": 92,
        "<eoi>": 93,
    }
    marks["<fake_token_around_image>"] = 94
    more = {f"<extra{n}>": n for n in range(95, VOCAB)}
    made = Tokenizer(models.WordLevel({**words, **marks, **more}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    own = {"image_token": "<image>", "video_token": "<video>", "fake_token": "<fake_token_around_image>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=own, **names)


def processor(name: str) -> Any:
    """The processor of a tiny model."""
    return made(PROCESSORS[name])


def made(case: TinyProcessor) -> Any:
    """A processor of its own."""
    import transformers
    from transformers.models.auto import image_processing_auto

    kind: Any = image_processing_auto.get_image_processor_class_from_name(case.images)
    images = kind(**case.sizes)
    if not case.kind:
        return OfGrids(images, tokenizer(case.special))
    return getattr(transformers, case.kind)(image_processor=images, tokenizer=tokenizer(case.special), **case.arguments)


class OfGrids:
    """What stands in for a processor whose video processor needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.video_processor = VideosOfGrids(image_processor)
        self.chat_template: str | None = None

    def __call__(
        self, images: list[list[Any]] | None = None, text: Any = (), videos: list[Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All as tensors; each ``<image>`` and ``<video>`` is as many tokens as its grid has places."""
        import torch

        made = dict(self.image_processor(images=images, return_tensors="pt")) if images and any(images) else {}
        if videos:
            made |= self.video_processor(videos)
            made["second_per_grid_ts"] = torch.tensor([1.0 + number for number in range(len(videos))])
        merged = self.image_processor.merge_size**2
        grids = {
            f"<{what}>": iter((made[f"{what}_grid_thw"].prod(-1) // merged).tolist())
            for what in ("image", "video")
            if f"{what}_grid_thw" in made
        }
        texts = [" ".join(f" {w}" * next(grids[w]) if w in grids else w for w in t.split()) for t in text]
        found = dict(self.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
        ids = found["input_ids"]
        return {**found, **made, "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO)}

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> str:
        """As a processor does it, by its `chat_template`."""
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=self.chat_template, tokenize=False, **kwargs
        )

    def save_pretrained(self, folder: Any) -> None:
        """Both into a folder."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class VideosOfGrids:
    """The patches of two frames each, in the order of transformers' video processors of grids."""

    def __init__(self, sizes: Any) -> None:
        self.patch, self.merge = sizes.patch_size, sizes.merge_size

    def __call__(self, videos: list[Any], **kwargs: Any) -> dict[str, Any]:
        """Of videos uint8 ``[frames, height, width, 3]``, all frames."""
        import torch

        patches, grids, patch, merge = list[Any](), list[list[int]](), self.patch, self.merge
        for video in videos:
            frames, height, width, _ = video.shape
            numbers = np.moveaxis(video, -1, 1).astype(np.float32) / 127.5 - 1
            tall, wide = height // patch // merge, width // patch // merge
            cut = numbers.reshape(frames // 2, 2, 3, tall, merge, patch, wide, merge, patch)
            patches.append(cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 6 * patch**2))
            grids.append([frames // 2, tall * merge, wide * merge])
        found = torch.from_numpy(np.concatenate(patches))
        return {"pixel_values_videos": found, "video_grid_thw": torch.tensor(grids)}


def picture(size: tuple[int, int], seed: int) -> np.ndarray[Any, Any]:
    """A picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
