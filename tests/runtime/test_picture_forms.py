"""A processor's output for pictures of several sizes, read picture by picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qeff_ir.arrays import Array
from qeff_ir.errors import RuntimeInputError
from qeff_ir.runtime.picture_form import FILE, InputForm, PictureForm, form_of_inputs
from qeff_ir.runtime.picture_forms import PictureForms

TOKEN = 7


def form(tiles: int, rows: int, sizes: list[int] | None = None, *, own_row: bool = False) -> PictureForm:
    """Of pictures of so many tiles of two pixels, filled up to those of the largest where they stand together."""
    shape = (1, tiles, 2)
    inputs = {"pixels": InputForm(shape, None, 1 if own_row else 0, 0)}
    if sizes is not None:
        inputs["sizes"] = InputForm((1, 2), [sizes], 0, 0)
    return PictureForm(f"vision_{tiles}", (tiles, 2), rows, inputs)


def pixels(*tiles: int, wide: int = 3) -> Array:
    """Pictures of so many tiles, one below the other, with zeros behind the shorter ones."""
    made = np.zeros((len(tiles), wide, 2), dtype=np.float32)
    for row, count in enumerate(tiles):
        made[row, :count] = row + 1
    return made


NAMED = PictureForms(TOKEN, 3, (form(2, 4, [2, 9]), form(3, 6, [3, 9])))


def test_constants_tell_the_size() -> None:
    given = {"pixels": pixels(3, 2, 3), "sizes": np.array([[3, 9], [2, 9], [3, 9]])}
    first, second = NAMED.split(given, [[TOKEN] * 10, [1, *[TOKEN] * 6]])
    assert [f.program for f, _ in first] == ["vision_3", "vision_2"]
    assert [f.program for f, _ in second] == ["vision_3"]
    assert [p["pixels"].shape for _, p in first] == [(1, 3, 2), (1, 2, 2)]
    assert (first[1][1]["pixels"] == 2).all() and (second[0][1]["pixels"] == 3).all()


def test_a_larger_picture_is_not_cut_off() -> None:
    given = {"pixels": pixels(3), "sizes": np.array([[2, 9]])}
    with pytest.raises(RuntimeInputError, match="which has 4 placeholders, are not of the compiled sizes"):
        NAMED.split(given, [[TOKEN] * 4])
    assert NAMED.of({"pixels": pixels(2, wide=2), "sizes": np.array([[2, 9]])}) is NAMED.sizes[0]
    assert NAMED.of({"pixels": pixels(3), "sizes": np.array([[3, 9]])}) is NAMED.sizes[1]
    assert NAMED.of({"pixels": pixels(2, wide=2), "sizes": np.array([[3, 9]])}) is None
    assert NAMED.of(given) is None


def test_placeholders_that_no_sizes_add_up_to_are_told() -> None:
    given = {"pixels": pixels(3, 2), "sizes": np.array([[3, 9], [2, 9]])}
    for places in (9, 6):
        with pytest.raises(RuntimeInputError, match=r"are not of the compiled sizes|more pictures than the text"):
            NAMED.split(given, [[TOKEN] * places])
    four = {"pixels": pixels(2, 2, 2, 2), "sizes": np.array([[2, 9]] * 4)}
    with pytest.raises(RuntimeInputError, match="a prompt has 4 pictures, the model is compiled for 3"):
        NAMED.split(four, [[TOKEN] * 16])


def test_tiles_alone_tell_sizes_by_their_number_only() -> None:
    forms = PictureForms(TOKEN, 9, (form(2, 4, own_row=True), form(3, 6, own_row=True)))
    tiles = np.arange(1, 21, dtype=np.float32).reshape(1, 10, 2)
    ((one, *_),) = forms.split({"pixels": tiles[:, :4]}, [[TOKEN] * 8])
    assert one[0].program == "vision_2" and (one[1]["pixels"] == tiles[:, :2]).all()
    with pytest.raises(RuntimeInputError, match="can be read as such of several compiled sizes"):
        forms.split({"pixels": tiles[:, :5]}, [[TOKEN] * 10])  # 2 and 3, or 3 and 2
    two, three = forms.sizes
    for known in ([two, three], [three, two]):
        (row,) = forms.split({"pixels": tiles[:, :5]}, [[TOKEN] * 10], [known])
        assert [f for f, _ in row] == known
        assert (np.concatenate([made["pixels"] for _, made in row], axis=1) == tiles[:, :5]).all()
    for wrong in ([two, two], [three, three], [two], []):
        with pytest.raises(RuntimeInputError, match="are not of the compiled sizes"):
            forms.split({"pixels": tiles[:, :5]}, [[TOKEN] * 10], [wrong])
    with pytest.raises(RuntimeInputError, match="with more pictures for prompt 1 than the 1 of its text"):
        forms.split({"pixels": tiles[:, :5]}, [[TOKEN] * 4], [[two, three]])


@pytest.mark.parametrize("own_row", [False, True])
def test_arrays_of_another_rank_are_told(own_row: bool) -> None:
    forms = PictureForms(TOKEN, 2, (form(2, 4, own_row=own_row),))
    for wrong in (
        np.ones(8, dtype=np.float32),
        np.zeros((), dtype=np.float32),
        np.ones((1, 1, 2, 2), dtype=np.float32),
    ):
        with pytest.raises(RuntimeInputError, match=r"pixels is \[.*\], and that of a picture has 3 axes"):
            forms.split({"pixels": wrong}, [[1], [TOKEN] * 4])


def test_a_mask_of_many_pixels_is_a_digest(tmp_path: Path) -> None:
    """Processors give one for each pixel of each tile, millions of numbers."""
    mask = np.ones((1, 17, 64, 64), dtype=np.int64)
    mask[:, :, :, 60:] = 0
    other, pixels = mask.copy(), np.ones((1, 17, 2), dtype=np.float32)
    other[0, 16, 63, 0] = 0
    pair, rows = (
        {"mask": np.concatenate([mask] * 2, axis), "pixels": np.concatenate([pixels] * 2, axis)} for axis in (1, 0)
    )
    inputs = form_of_inputs({"mask": mask, "pixels": pixels}, pair, rows)
    PictureForms(TOKEN, 1, (PictureForm("vision", (8, 8), 2, inputs),)).write(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 2000
    forms = PictureForms.read(tmp_path)
    for same in (mask, mask.astype(bool), mask.astype(np.int32)):
        assert forms.of({"mask": same, "pixels": pixels}) is forms.sizes[0]
    (((_, found),),) = forms.split({"mask": mask, "pixels": pixels}, [[TOKEN] * 2])
    assert (found["mask"] == mask).all()
    for wrong in (other, 1 - mask, mask.astype(np.float32), mask.astype(str)):
        with pytest.raises(
            RuntimeInputError, match=r"mask is \[1, 17, 64, 64\] of other numbers, and a picture of the"
        ):
            forms.split({"mask": wrong, "pixels": pixels}, [[TOKEN] * 2])


def test_a_search_without_an_answer_ends() -> None:
    """Where every order of sizes fits the pixels, and none the placeholders."""
    forms = PictureForms(TOKEN, 60, (form(2, 4, own_row=True), form(3, 6, own_row=True)))
    with pytest.raises(RuntimeInputError, match="which has 119 placeholders"):
        forms.split({"pixels": np.ones((1, 200, 2), dtype=np.float32)}, [[TOKEN] * 119])
