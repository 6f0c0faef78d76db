"""``--image`` of ``qeff run`` and ``--image-size`` of ``qeff compile``: models of pictures and text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.cli.models import compiling, refuse_options
from qeff_ir.cli.request import Request
from qeff_ir.cli.terminal import line, quiet_transformers, working
from qeff_ir.errors import CompileError, RuntimeInputError, first_line
from qeff_ir.reading import path_of, regular_file

if TYPE_CHECKING:
    from qeff_ir.auto.image_text import QEFFAutoModelForImageTextToText
    from qeff_ir.compiler import Compiled

_SIZE = re.compile(r"([1-9]\d{0,5})[x,]([1-9]\d{0,5})")
_PIXELS = 1 << 26
"""Pixels of the largest picture that is read."""


def size_of(text: str) -> tuple[int, int]:
    """Height and width from ``336x336``.

    Raises:
        CompileError: It is something else.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise CompileError(f"--image-size is {text!a:.40}: give height and width in pixels, as 336x336")
    return int(found[1]), int(found[2])


def compile_pictures(
    model: str,
    request: Request,
    sizes: Sequence[tuple[int, int]],
    count: int,
    out: Path | None = None,
    *,
    single_program: bool = False,
) -> QEFFAutoModelForImageTextToText:
    """Compile a model of pictures and text.

    Args:
        model: A model folder or hub id.
        request: The shared options.
        sizes: Height and width of pictures.
        count: Pictures of a prompt.
        out: Folder of the package; in the cache by default.
        single_program: Whether one program takes pixels and tokens.

    Raises:
        QeffError: See `qeff_ir.auto.image_text.QEFFAutoModelForImageTextToText.compile`.
    """
    from qeff_ir.auto.image_text import QEFFAutoModelForImageTextToText

    quiet_transformers()
    with working(f"Opening {model}"):
        found = QEFFAutoModelForImageTextToText.from_pretrained(
            model, kv_offload=not single_program, trust_remote_code=request.trust_remote_code
        )
    shapes = {} if "ctx_len" in request.given else {"ctx_len": None}
    with compiling(request) as rest:
        found.compile_with(
            {**request.options(), **shapes},
            image_size=list(dict.fromkeys(sizes)),
            num_images=count,
            compile_dir=out,
            token_embedding=request.token_embedding,
            **rest,
        )
    return found


def answer_about(
    model: str,
    images: Sequence[Path],
    prompts: Sequence[str],
    request: Request,
    settings: dict[str, Any],
    *,
    resize: bool = False,
) -> Compiled:
    """Answer prompts about pictures, one by one, and print the answers.

    Args:
        model: A package, or a model, which is compiled into the cache for pictures of their sizes.
        images: The pictures; a package may be asked about none.
        prompts: The prompts.
        request: The shared options.
        settings: Arguments of ``generate``; with ``stream``, the answer is printed as it grows.
        resize: Whether pictures that have none of the compiled sizes are resized to the nearest.

    Raises:
        QeffError: A picture cannot be read, or the model cannot be compiled, opened or run.
    """
    from qeff_ir.package import SIDE_FOLDER, is_package
    from qeff_ir.runtime.picture_prompts import fitting, processed
    from qeff_ir.side_files import read_processor

    pictures, stream = [read_picture(path) for path in images], settings.pop("stream")
    folder = path_of(model, "the model")
    if is_package(folder):
        from qeff_ir.auto.image_text import QEFFAutoModelForImageTextToText

        refuse_options(model, request.given)
        found = QEFFAutoModelForImageTextToText.from_package(folder)
    else:
        sizes = list(dict.fromkeys((picture.height, picture.width) for picture in pictures))
        found = compile_pictures(model, request, sizes, len(pictures))
    with working("Opening the session"):
        quiet_transformers()
        processor = read_processor(found.package.folder / SIDE_FOLDER)
        forms = found.runner().forms
    pictures = [fitting(forms, processor, picture, resize=resize)[0] for picture in pictures]
    if stream:
        from transformers import TextStreamer

        settings["streamer"] = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for prompt in prompts:
        inputs = processed(processor, prompt, pictures)
        ids = found.generate(**inputs, **settings)
        if not stream:
            new = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            line((prompt, "cyan"), " ", new[0])
    return found.package


def is_of_pictures(model: str) -> bool:
    """Whether it is a package of a model of pictures and text.

    Raises:
        PackageError: It is a damaged package.
    """
    from qeff_ir.package import SIDE_FOLDER, is_package, open_package
    from qeff_ir.runtime.picture_forms import FILE

    folder = path_of(model, "the model")
    if not is_package(folder):
        return False
    open_package(folder)
    return (folder / SIDE_FOLDER / FILE).is_file()


def read_picture(path: Path) -> Any:
    """A picture from a file, turned as its camera was held.

    Raises:
        RuntimeInputError: It cannot be read, is too large, or Pillow is not installed.
    """
    file = regular_file(path_of(path, "--image", RuntimeInputError), error=RuntimeInputError)
    need_pillow()
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as found:
            if found.width * found.height > _PIXELS:
                raise RuntimeInputError(
                    f"{path} has {found.width * found.height:,} pixels, at most {_PIXELS:,} are read: make it smaller"
                )
            return ImageOps.exif_transpose(found).convert("RGB")
    except RuntimeInputError:
        raise
    except Exception as error:  # Pillow has an error for each of its formats
        raise RuntimeInputError(f"{path} is not a picture that Pillow reads ({first_line(error)})") from error


def need_pillow() -> None:
    """Refuse to go on without Pillow.

    Raises:
        RuntimeInputError: It is not installed.
    """
    try:
        import PIL  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise RuntimeInputError("pictures are read by Pillow, which is not installed: pip install pillow") from error
