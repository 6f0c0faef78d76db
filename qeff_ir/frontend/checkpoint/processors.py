"""The part of a model's processor that makes numbers of pictures or of sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qeff_ir.errors import ModelLoadError, UnsupportedModelError, first_line

PartKind = Literal["AutoImageProcessor", "AutoVideoProcessor", "AutoFeatureExtractor"]
_SAID: dict[PartKind, str] = {
    "AutoImageProcessor": "image processor",
    "AutoVideoProcessor": "video processor",
    "AutoFeatureExtractor": "feature extractor",
}


def read_part(kind: PartKind, folder: Path, *, trust_remote_code: bool) -> Any:
    """transformers' image processor, video processor or feature extractor of a model folder.

    Raises:
        ModelLoadError: There is none that can be read.
    """
    import transformers

    loader: Any = getattr(transformers, kind)
    try:
        return loader.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many processors raise
        raise ModelLoadError(
            f"{folder} has no {_SAID[kind]} that can be read ({first_line(error)}): put the model's "
            "preprocessor_config.json there"
        ) from error


def part_of(kind: PartKind, processor: Any) -> Any:
    """The same of a processor in memory, which may be that part itself.

    Raises:
        UnsupportedModelError: It has none for videos.
    """
    itself = None if kind == "AutoVideoProcessor" else processor
    found = getattr(processor, _SAID[kind].replace(" ", "_"), itself)
    if found is None and kind == "AutoVideoProcessor":
        raise UnsupportedModelError(
            f"{type(processor).__name__} has no video processor: compile for pictures, without num_frames"
        )
    return found
