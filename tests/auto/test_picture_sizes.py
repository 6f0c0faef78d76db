"""Sizes of pictures as callers give them, and by the incumbent's names."""

from __future__ import annotations

from typing import Any

import pytest

from qeff_ir.auto.picture_sizes import picture_sizes
from qeff_ir.errors import CompileError


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"image_size": (336, 448)}, [(336, 448)]),
        ({"image_size": 896}, [(896, 896)]),
        ({"image_size": [[336, 448], (448, 336), (336, 448)]}, [(336, 448), (448, 336)]),
        ({"img_size": 336, "height": None}, [(336, 336)]),
        ({"height": 354, "width": 536}, [(354, 536)]),
        ({"height": [354, 100], "width": [536, 200]}, [(354, 536), (100, 200)]),
        ({"image_height": 64, "image_width": 32, "skip_vision": False, "num_patches": None}, [(64, 32)]),
    ],
)
def test_every_spelling_gives_heights_and_widths(given: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    assert picture_sizes({**given, "mos": 1}) == (sizes, {"mos": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"the size of pictures is missing: give image_size="),
        ({"image_size": (8, 8), "img_size": 8}, "is given by image_size, img_size: give image_size"),
        ({"image_size": (0, 8)}, r"image_size is \(0, 8\): give height and width"),
        ({"image_size": (True, 8)}, r"image_size is \(True, 8\)"),
        ({"image_size": []}, r"image_size is \[\]"),
        ({"height": 8}, r"height and width is \[\[8, None\]\]"),
        ({"height": [8, 9], "width": 8}, "height has 2 numbers and width 1: give pairs"),
        ({"image_size": 8, "num_patches": 13}, "num_patches follows from the size of the pictures"),
        ({"image_size": 8, "skip_lang": True}, "skip_lang=True asks for one program alone"),
    ],
)
def test_what_is_no_size_is_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        picture_sizes(given)
