"""What a processor makes of one picture of a compiled size: shapes, constants, and the rows that it takes in a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError

FILE = "pictures.json"
"""Where a package has them, in its side files."""

_LISTED = 64
"""Whole numbers that are kept as they are; of more (a mask has one for each pixel) only a digest is."""


@dataclass(frozen=True)
class InputForm:
    """One input of the encoder.

    Attributes:
        shape: For one picture.
        numbers: Its numbers where they are whole, which are constants of the encoder, or a digest of many
            (`known_numbers`); `None` for pixels.
        axis: Along which the pictures of one prompt follow one another.
        row_axis: Along which prompts do; `axis` where the pictures of all prompts do.
    """

    shape: tuple[int, ...]
    numbers: list[Any] | str | None
    axis: int
    row_axis: int

    @property
    def step(self) -> int:
        """Entries of one picture along `axis`."""
        return self.shape[self.axis]


@dataclass(frozen=True)
class PictureForm:
    """What the processor makes of one picture of a size.

    Attributes:
        program: The encoder of such pictures.
        size: Height and width of the picture that it was found with.
        rows: Rows that the encoder makes of a picture.
        inputs: By name.
        frames: Of a video: how many it has; 0 for a picture.
    """

    program: str
    size: tuple[int, int]
    rows: int
    inputs: dict[str, InputForm]
    frames: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> PictureForm:
        """From JSON data.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: It is of something else.
        """
        inputs = {
            str(name): InputForm(tuple(map(int, i["shape"])), i["numbers"], int(i["axis"]), int(i["row_axis"]))
            for name, i in data["inputs"].items()
        }
        height, width = map(int, data["size"])
        found = cls(str(data["program"]), (height, width), int(data["rows"]), inputs, int(data["frames"]))
        for wrong in found._nonsense():
            raise ValueError(wrong)
        return found

    def _nonsense(self) -> Iterator[str]:
        """What cannot be so."""
        for name, number in (("rows", self.rows), ("size", min(self.size))):
            if number < 1:
                yield f"{name} is {number}"
        if not self.inputs:
            yield "there are no inputs"
        elif all(form.numbers is not None for form in self.inputs.values()):
            yield "there are no pixels"
        for name, form in self.inputs.items():
            if not all(0 <= axis < len(form.shape) for axis in (form.axis, form.row_axis)) or min(form.shape) < 1:
                yield f"{name} has the shape {list(form.shape)} and axes {form.axis} and {form.row_axis}"

    @property
    def pixels(self) -> tuple[str, InputForm]:
        """The first input that is no constant; an encoder in a language model's graph has no other."""
        return next((name, form) for name, form in self.inputs.items() if form.numbers is None)

    @property
    def said(self) -> str:
        """The size in words."""
        size = f"{self.size[0]} x {self.size[1]}"
        return f"{self.frames} frames of {size}" if self.frames else size

    def check(self, encoder: Mapping[str, Sequence[object]]) -> None:
        """Compare with the inputs of an encoder, shapes by name.

        Raises:
            PackageError: They are of other pictures.
        """
        own = {name: form.shape for name, form in self.inputs.items() if form.numbers is None}
        if {name: tuple(shape) for name, shape in encoder.items()} != own:
            raise PackageError(f"{FILE} is of other pictures than the encoder takes: compile the model again")

    def cut(self, arrays: Mapping[str, Array], starts: Mapping[str, int]) -> dict[str, Array]:
        """The picture that begins at these places of a prompt's part of the processor's output.

        Processors fill smaller pictures up with zeros where they stand beside larger ones; these are left out.

        Args:
            arrays: By name, those that the encoder takes.
            starts: Along the axis of pictures, by name.

        Raises:
            RuntimeInputError: What stands there is of another size.
        """
        return {name: self._piece(name, form, arrays[name], starts[name]) for name, form in self.inputs.items()}

    def _piece(self, name: str, form: InputForm, array: Array, start: int) -> Array:
        if array.ndim != len(form.shape):
            raise self._other_size(name, form, array)
        if start + form.step > array.shape[form.axis]:
            raise self._other_size(name, form, array)
        whole = array.take(range(start, start + form.step), axis=form.axis)
        piece = whole[tuple(slice(size) for size in form.shape)]
        if piece.shape != form.shape or (form.numbers is not None and known_numbers(piece) != form.numbers):
            raise self._other_size(name, form, whole)
        if piece.size < whole.size and np.count_nonzero(whole) != np.count_nonzero(piece):
            raise self._other_size(name, form, whole)
        if form.numbers is None and not (np.issubdtype(piece.dtype, np.floating) and np.isfinite(piece).all()):
            raise RuntimeInputError(
                f"{name} is {piece.dtype}, or has numbers that are not finite: give what the processor returns"
            )
        return piece

    def _other_size(self, name: str, form: InputForm, found: Array) -> RuntimeInputError:
        listed = isinstance(form.numbers, list) and found.size <= 8
        shown, wanted = (found.tolist(), form.numbers) if listed else (list(found.shape), list(form.shape))
        other = " of other numbers" if shown == wanted else ""
        what, way = "picture", "resize the pictures to that, or compile with their image_size"
        if self.frames:
            what, way = "video", "give as many frames of that size, or compile with their num_frames and image_size"
        return RuntimeInputError(
            f"{name} is {shown}{other}, and a {what} of the compiled size ({self.said}) gives {wanted}: {way}"
        )


def form_of_inputs(
    one: Mapping[str, Array], pair: Mapping[str, Array], rows: Mapping[str, Array]
) -> dict[str, InputForm]:
    """How pictures lie in a processor's output.

    Args:
        one: What it makes of one picture.
        pair: Of two pictures of one prompt.
        rows: Of two prompts with one picture each.

    Raises:
        RuntimeInputError: Two pictures do not just double one size of an input.
    """
    found: dict[str, InputForm] = {}
    for name, array in one.items():
        axes = [_doubled(name, array, other[name]) for other in (pair, rows)]
        numbers = known_numbers(array) if array.dtype.kind in "biu" else None
        found[name] = InputForm(array.shape, numbers, *axes)
    return found


def known_numbers(array: Array) -> list[Any] | str:
    """Whole numbers as a form has them: as they are, or the SHA-256 of many as int64; "" for many others."""
    if array.size <= _LISTED:
        return cast("list[Any]", array.tolist())
    if array.dtype.kind not in "biu":
        return ""
    return hashlib.sha256(array.astype(np.int64).tobytes()).hexdigest()


def _doubled(name: str, one: Array, two: Array) -> int:
    axes = [n for n, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
    if one.ndim != two.ndim or len(axes) != 1 or two.shape[axes[0]] != 2 * one.shape[axes[0]]:
        raise RuntimeInputError(
            f"the processor gives {name} {list(one.shape)} for one picture and {list(two.shape)} for two: pictures "
            "cannot be told apart in it"
        )
    return axes[0]
