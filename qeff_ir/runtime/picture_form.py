"""What a processor makes of one picture of the compiled size, and how several lie in its output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.reading import read_json

FILE = "pictures.json"


@dataclass(frozen=True)
class InputForm:
    """One input of the encoder.

    Attributes:
        shape: For one picture.
        numbers: Its numbers where they are whole, which are constants of the encoder; `None` for pixels.
        axis: Along which the pictures of one prompt follow one another.
        row_axis: Along which prompts do; `axis` where the pictures of all prompts do.
    """

    shape: tuple[int, ...]
    numbers: list[Any] | None
    axis: int
    row_axis: int


@dataclass(frozen=True)
class PictureForm:
    """What the processor makes of one picture.

    Attributes:
        size: Height and width of the picture that it was found with.
        token: The token that stands for one row.
        rows: Rows that the encoder makes of a picture.
        count: Pictures that a prompt may have.
        inputs: By name.
    """

    size: tuple[int, int]
    token: int
    rows: int
    count: int
    inputs: dict[str, InputForm]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Put it into a folder of side files."""
        (folder / FILE).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> PictureForm:
        """From a folder of side files.

        Raises:
            PackageError: It is missing or damaged.
        """
        path = folder / FILE
        data = read_json(path, error=PackageError)
        try:
            inputs = {
                str(name): InputForm(tuple(map(int, i["shape"])), i["numbers"], int(i["axis"]), int(i["row_axis"]))
                for name, i in data["inputs"].items()
            }
            height, width = map(int, data["size"])
            found = cls((height, width), int(data["token"]), int(data["rows"]), int(data["count"]), inputs)
            for wrong in found._nonsense():
                raise ValueError(wrong)
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackageError(f"{path} is damaged ({error}): compile the model again") from error

    def _nonsense(self) -> Iterator[str]:
        """What cannot be so."""
        for name, number in (("rows", self.rows), ("count", self.count), ("size", min(self.size))):
            if number < 1:
                yield f"{name} is {number}"
        if not self.inputs:
            yield "there are no inputs"
        for name, form in self.inputs.items():
            if not all(0 <= axis < len(form.shape) for axis in (form.axis, form.row_axis)) or min(form.shape) < 1:
                yield f"{name} has the shape {list(form.shape)} and axes {form.axis} and {form.row_axis}"

    def check(self, encoder: Mapping[str, Sequence[object]]) -> None:
        """Compare with the inputs of an encoder, shapes by name.

        Raises:
            PackageError: They are of other pictures.
        """
        own = {name: form.shape for name, form in self.inputs.items() if form.numbers is None}
        if {name: tuple(shape) for name, shape in encoder.items()} != own:
            raise PackageError(f"{FILE} is of other pictures than the encoder takes: compile the model again")

    def counts(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Pictures of each prompt, by its placeholders.

        Raises:
            RuntimeInputError: They are not those of whole pictures, or too many.
        """
        found: list[int] = []
        for ids in prompts:
            places = sum(token == self.token for token in ids)
            number, left = divmod(places, self.rows)
            if left:
                raise RuntimeInputError(
                    f"a prompt has {places} placeholders, and a picture of the compiled size ({self.said}) takes "
                    f"{self.rows}: give the processor's output for pictures of that size"
                )
            if number > self.count:
                raise RuntimeInputError(
                    f"a prompt has {number} pictures, the model is compiled for {self.count}: compile with "
                    f"num_images={number}"
                )
            found.append(number)
        return found

    @property
    def said(self) -> str:
        """The size in words."""
        return f"{self.size[0]} x {self.size[1]}"

    def split(self, given: Mapping[str, Array], counts: Sequence[int]) -> list[list[dict[str, Array]]]:
        """What the processor has made of the pictures of several prompts, picture by picture.

        Args:
            given: The processor's output, those that the encoder takes.
            counts: Pictures of each prompt.

        Raises:
            RuntimeInputError: An input is missing, there are more or fewer pictures, or one has another size.
        """
        if not any(counts):
            return [[] for _ in counts]
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise RuntimeInputError(
                f"the text has placeholders for {sum(counts)} pictures, and '{missing[0]}' is missing: give what the "
                "processor returns for text and pictures together"
            )
        made: list[list[dict[str, Array]]] = [[{} for _ in range(count)] for count in counts]
        for name, form in self.inputs.items():
            for row, parts in enumerate(self._pieces(name, form, given[name], counts)):
                for number, part in enumerate(parts):
                    made[row][number][name] = part
        return made

    def _pieces(self, name: str, form: InputForm, array: Array, counts: Sequence[int]) -> list[list[Array]]:
        step, found = form.shape[form.axis], list[list[Array]]()
        if array.ndim != len(form.shape):
            raise self._other_size(name, form, array)
        if form.axis == form.row_axis and array.shape[form.axis] != step * sum(counts):
            raise self._other_size(name, form, array)
        if form.axis != form.row_axis and array.shape[form.row_axis] != len(counts):
            raise RuntimeInputError(
                f"{name} is {list(array.shape)}, for {array.shape[form.row_axis]} prompts, and there are "
                f"{len(counts)}: give both together"
            )
        start = 0
        for row, count in enumerate(counts):
            whole = array
            if form.axis != form.row_axis:
                whole, start = array.take(range(row, row + 1), axis=form.row_axis), 0
                if whole.take(range(count * step, whole.shape[form.axis]), axis=form.axis).any():  # zeros are padding
                    raise RuntimeInputError(
                        f"{name} is {list(array.shape)}, with more pictures for prompt {row + 1} than the {count} "
                        "of its text: give both together"
                    )
            places = [range(start + n * step, start + (n + 1) * step) for n in range(count)]
            if places and places[-1].stop > whole.shape[form.axis]:
                raise self._other_size(name, form, array)
            found.append([self._checked(name, form, whole.take(place, axis=form.axis)) for place in places])
            start += count * step
        return found

    def _checked(self, name: str, form: InputForm, piece: Array) -> Array:
        if piece.shape != form.shape or (form.numbers is not None and piece.tolist() != form.numbers):
            raise self._other_size(name, form, piece)
        if form.numbers is None and not (np.issubdtype(piece.dtype, np.floating) and np.isfinite(piece).all()):
            raise RuntimeInputError(
                f"{name} is {piece.dtype}, or has numbers that are not finite: give what the processor returns"
            )
        return piece

    def _other_size(self, name: str, form: InputForm, found: Array) -> RuntimeInputError:
        shown = found.tolist() if form.numbers is not None and found.size <= 8 else list(found.shape)
        wanted = form.numbers if form.numbers is not None and found.size <= 8 else list(form.shape)
        return RuntimeInputError(
            f"{name} is {shown}, and a picture of the compiled size ({self.said}) gives {wanted}: resize the pictures "
            "to that, or compile with their image_size"
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
        whole = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
        numbers = cast("list[Any]", array.tolist()) if whole else None
        found[name] = InputForm(array.shape, numbers, *axes)
    return found


def _doubled(name: str, one: Array, two: Array) -> int:
    axes = [n for n, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
    if one.ndim != two.ndim or len(axes) != 1 or two.shape[axes[0]] != 2 * one.shape[axes[0]]:
        raise RuntimeInputError(
            f"the processor gives {name} {list(one.shape)} for one picture and {list(two.shape)} for two: pictures "
            "cannot be told apart in it"
        )
    return axes[0]
