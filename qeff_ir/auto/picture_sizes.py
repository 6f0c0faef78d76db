"""The sizes of pictures that ``compile`` is asked for, also by the names of the incumbent (AI 100 contract §1.9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_ir.errors import CompileError

_SQUARE = ("image_size", "img_size")
_SIDES = (("height", "width"), ("image_height", "image_width"))
_FOLLOWS = ("num_patches", "max_num_tiles", "vision_size", "valid_size", "num_crops", "mm_tokens_per_image")
"""Numbers that follow from the size of a picture here."""
_PARTS = ("skip_vision", "skip_lang")


def asks_for_pictures(given: Mapping[str, Any]) -> bool:
    """Whether arguments of ``compile`` name a size of pictures."""
    names = (*_SQUARE, *(side for sides in _SIDES for side in sides))
    return any(given.get(name) is not None for name in names)


def picture_sizes(given: Mapping[str, Any]) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Heights and widths, each once, and the arguments that are left.

    Args:
        given: Arguments of ``compile``: ``image_size`` (or ``img_size``) as one side, as height and width, or as
            several pairs of them; or ``height`` and ``width`` (``image_height``, ``image_width``), numbers or lists.

    Raises:
        CompileError: There is no size, more than one of these, or something that is none; or a number is given that
            follows from the size.
    """
    rest = dict(given)
    for name in _FOLLOWS:
        if rest.pop(name, None) is not None:
            raise CompileError(f"{name} follows from the size of the pictures: give image_size alone")
    for name in _PARTS:
        if rest.pop(name, False):
            raise CompileError(f"{name}=True asks for one program alone, which is not supported: leave {name} out")
    asked = {name: value for name in _SQUARE if (value := rest.pop(name, None)) is not None}
    for sides in _SIDES:
        values = [rest.pop(side, None) for side in sides]
        if values != [None, None]:
            asked[" and ".join(sides)] = _pairs(sides, *values)
    if len(asked) != 1:
        names = ", ".join(asked)
        raise CompileError(
            f"the size of pictures is given by {names}: give image_size=(height, width) alone"
            if asked
            else "the size of pictures is missing: give image_size=(height, width), or several of them"
        )
    return _checked(*asked.popitem()), rest


def _pairs(sides: tuple[str, str], heights: Any, widths: Any) -> list[Any]:
    found: list[list[Any]] = [list(side) if isinstance(side, list | tuple) else [side] for side in (heights, widths)]  # pyright: ignore[reportUnknownArgumentType]
    if len(found[0]) != len(found[1]):
        raise CompileError(f"{sides[0]} has {len(found[0])} numbers and {sides[1]} {len(found[1])}: give pairs")
    return [list(pair) for pair in zip(*found, strict=True)]


def _checked(name: str, given: object) -> list[tuple[int, int]]:
    numbers: list[Any] = list(given) if isinstance(given, list | tuple) else [given, given]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    pairs = numbers if numbers and all(isinstance(one, list | tuple) for one in numbers) else [numbers]
    sizes: list[tuple[int, int]] = []
    for pair in pairs:
        if len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
            raise CompileError(f"{name} is {given!r}: give height and width in pixels, or several pairs of them")
        sizes.append((pair[0], pair[1]))
    return list(dict.fromkeys(sizes))
