"""The sizes of pictures that a model is compiled for, and which of them the pictures of a prompt have.

A processor's output does not say where one picture ends. It is read picture by picture: the one of the sizes whose
constants and shapes stand there, such that the placeholders of the text come out. Two readings are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qeff_ir.arrays import Array
from qeff_ir.errors import PackageError, RuntimeInputError
from qeff_ir.package import MAIN
from qeff_ir.reading import read_json
from qeff_ir.runtime.picture_form import FILE, InputForm, PictureForm

Picture = tuple[PictureForm, dict[str, Array]]
"""The size of a picture, and what the processor made of it."""


@dataclass(frozen=True)
class PictureForms:
    """What the processor makes of pictures of the compiled sizes.

    Attributes:
        token: The token that stands for one row.
        count: Pictures that a prompt may have.
        sizes: The sizes, each with an encoder of its own; at least one. One alone may have it in the main program.
        beside: Names of what else a processor returns that has a number for each picture, which say where tokens are.
    """

    token: int
    count: int
    sizes: tuple[PictureForm, ...]
    beside: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Put it into a folder of side files."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> PictureForms:
        """From a folder of side files.

        Raises:
            PackageError: It is missing or damaged.
        """
        path = folder / FILE
        data = read_json(path, error=PackageError)
        try:
            sizes = tuple(PictureForm.from_json(size) for size in data["sizes"])
            found = cls(int(data["token"]), int(data["count"]), sizes, tuple(map(str, data["beside"])))
            if found.count < 1:
                raise ValueError(f"count is {found.count}")
            programs = {form.program for form in sizes}
            single = MAIN in programs and len(sizes) > 1
            if not sizes or len(programs) < len(sizes) or single or not _alike(sizes):
                raise ValueError("the sizes are none, or do not go together")
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackageError(f"{path} is damaged ({error}): compile the model again") from error

    @property
    def inputs(self) -> Mapping[str, InputForm]:
        """The inputs of every encoder, which lie in the processor's output alike for each size."""
        return self.sizes[0].inputs

    @property
    def videos(self) -> bool:
        """Whether they are videos, of so many frames, and no pictures."""
        return self.sizes[0].frames > 0

    @property
    def what(self) -> str:
        """What they are, in a word."""
        return "videos" if self.videos else "pictures"

    @property
    def said(self) -> str:
        """The sizes in words."""
        return ", ".join(form.said for form in self.sizes)

    def check_batch(self, shapes: Sequence[Sequence[int]], batch: int) -> None:
        """Compare with what a graph that has the encoder keeps: pixels of as many pictures as a batch may have.

        Raises:
            PackageError: They are of other pictures, or it keeps something else.
        """
        _, form = self.sizes[0].pixels
        wanted = list(form.shape)
        wanted[form.axis] *= self.count
        wanted[form.row_axis] *= batch
        if [list(shape) for shape in shapes] != [wanted]:
            raise PackageError(f"{FILE} is of other pictures than the encoder takes: compile the model again")

    def of(self, given: Mapping[str, Array]) -> PictureForm | None:
        """The compiled size that the processor's output for one picture is of; `None` for another."""
        shapes = {name: array.shape for name, array in given.items()}
        for form in self.sizes:
            if {name: one.shape for name, one in form.inputs.items()} == shapes:
                try:
                    form.cut(given, dict.fromkeys(shapes, 0))
                except RuntimeInputError:
                    continue
                return form
        return None

    def split(
        self,
        given: Mapping[str, Array],
        prompts: Sequence[Sequence[int]],
        known: Sequence[Sequence[PictureForm]] | None = None,
    ) -> list[list[Picture]]:
        """What the processor has made of the pictures of several prompts, picture by picture.

        Args:
            given: The processor's output, those that the encoders take.
            prompts: Token ids of each prompt, without padding.
            known: The sizes of the pictures of each, where a caller has seen the pictures.

        Raises:
            RuntimeInputError: The placeholders are not those of whole pictures, an input is missing, there are more or
                fewer pictures than the text has, or one has no compiled size.
        """
        places = [sum(token == self.token for token in ids) for ids in prompts]
        for count in places:
            self._check(count)
        if not any(places):
            if given:
                raise RuntimeInputError(
                    "there are pictures, and the text has no placeholder for one: give both together"
                )
            return [[] for _ in prompts]
        missing = [name for name in self.inputs if name not in given]
        if missing:
            number = f"{sum(places) // self.sizes[0].rows} pictures" if len(self.sizes) == 1 else "pictures"
            raise RuntimeInputError(
                f"the text has placeholders for {number}, and '{missing[0]}' is missing: give what the processor "
                "returns for text and pictures together"
            )
        starts, found = dict.fromkeys(self.inputs, 0), list[list[Picture]]()
        for row, count in enumerate(places):
            own = {name: _of_row(name, form, given[name], row, len(places)) for name, form in self.inputs.items()}
            starts = {name: start if self._joined(name) else 0 for name, start in starts.items()}
            pictures, starts = self._read_row(own, starts, count, row, None if known is None else known[row])
            for name, form in self.inputs.items():
                if row == len(places) - 1 or not self._joined(name):
                    _check_end(name, form, own[name], starts[name], row, len(pictures))
            found.append(pictures)
        return found

    def _check(self, places: int) -> None:
        """Refuse placeholders that are not those of whole pictures, where all pictures have one size.

        Raises:
            RuntimeInputError: They are not, or there are too many pictures.
        """
        rows, *others = (form.rows for form in self.sizes)
        if others:
            return  # the pictures tell
        if places % rows:
            raise RuntimeInputError(
                f"a prompt has {places} placeholders, and a {self.what[:-1]} of the compiled size ({self.said}) takes "
                f"{rows}: give the processor's output for {self.what} of that size"
            )
        self._check_count(places // rows)

    def _check_count(self, found: int) -> None:
        if found > self.count and self.videos:  # of fewer frames, they would be more
            raise RuntimeInputError(
                f"a prompt has placeholders for {found} videos of {self.said}, and the model is compiled for "
                f"{self.count}: give videos of that length, or compile with their num_frames, or num_videos={found}"
            )
        if found > self.count:
            raise RuntimeInputError(
                f"a prompt has {found} pictures, the model is compiled for {self.count}: compile with "
                f"num_images={found}"
            )

    def _joined(self, name: str) -> bool:
        """Whether the pictures of all prompts follow one another in an input."""
        form = self.inputs[name]
        return form.axis == form.row_axis

    def _read_row(
        self,
        own: Mapping[str, Array],
        starts: dict[str, int],
        places: int,
        row: int,
        known: Sequence[PictureForm] | None,
    ) -> tuple[list[Picture], dict[str, int]]:
        """The pictures of one prompt, and where the next one's begin.

        Raises:
            RuntimeInputError: There is no reading, or there is more than one.
        """
        search = _Search(self, own, known)
        readings = search.readings(places, starts)
        first = next(readings, None)
        if first is None and len(self.sizes) == 1:
            raise search.wrong or RuntimeInputError(f"the pictures of prompt {row + 1} cannot be told apart")
        if first is None:
            raise RuntimeInputError(
                f"the pictures of prompt {row + 1}, which has {places} placeholders, are not of the compiled sizes "
                f"({self.said}): resize them (resize=True), or compile with their image_size"
            )
        if next(readings, None) is not None:
            raise RuntimeInputError(
                f"the pictures of prompt {row + 1} can be read as such of several compiled sizes ({self.said}): give "
                "pictures of one size in a prompt, or compile for fewer sizes"
            )
        self._check_count(len(first))
        for form, _ in first:
            starts = {name: start + form.inputs[name].step for name, start in starts.items()}
        return first, starts


class _Search:
    """Readings of one prompt's part of a processor's output.

    Attributes:
        wrong: Why the first size did not fit.
    """

    def __init__(
        self, forms: PictureForms, arrays: Mapping[str, Array], known: Sequence[PictureForm] | None = None
    ) -> None:
        self._forms, self._arrays, self._known = forms, arrays, known
        self._dead: set[tuple[int, ...]] = set()
        self.wrong: RuntimeInputError | None = None

    def readings(self, places: int, starts: Mapping[str, int], number: int = 0) -> Iterator[list[Picture]]:
        """All readings with so many placeholders from these places on, where a picture of this number begins."""
        state = (places, *starts.values())
        if places == 0:
            yield []
            return
        if state in self._dead:
            return
        empty = True
        for form in self._forms.sizes if self._known is None else self._known[number : number + 1]:
            if form.rows > places:
                continue
            try:
                picture = form.cut(self._arrays, starts)
            except RuntimeInputError as error:
                self.wrong = self.wrong or error
                continue
            behind = {name: start + form.inputs[name].step for name, start in starts.items()}
            for rest in self.readings(places - form.rows, behind, number + 1):
                empty = False
                yield [(form, picture), *rest]
        if empty:
            self._dead.add(state)


def _alike(sizes: Sequence[PictureForm]) -> bool:
    """Whether pictures of all sizes lie alike in a processor's output."""
    layouts = [{name: (i.axis, i.row_axis, len(i.shape)) for name, i in form.inputs.items()} for form in sizes]
    return all(layout == layouts[0] for layout in layouts)


def check_alike(sizes: Sequence[PictureForm]) -> None:
    """Refuse sizes that are laid out differently.

    Raises:
        RuntimeInputError: They are.
    """
    if not _alike(sizes):
        said = ", ".join(form.said for form in sizes)
        raise RuntimeInputError(f"the processor lays out pictures of {said} differently: compile for each by itself")


def _of_row(name: str, form: InputForm, array: Array, row: int, rows: int) -> Array:
    """The part of one prompt in an input; all of it where the pictures of all prompts follow one another.

    Raises:
        RuntimeInputError: It is of another rank, or of another number of prompts.
    """
    if array.ndim != len(form.shape):
        raise RuntimeInputError(
            f"{name} is {list(array.shape)}, and that of a picture has {len(form.shape)} axes: give what the processor "
            "returns"
        )
    if form.axis == form.row_axis:
        return array
    if array.shape[form.row_axis] != rows:
        raise RuntimeInputError(
            f"{name} is {list(array.shape)}, for {array.shape[form.row_axis]} prompts, and there are {rows}: give both "
            "together"
        )
    return array.take(range(row, row + 1), axis=form.row_axis)


def _check_end(name: str, form: InputForm, array: Array, end: int, row: int, count: int) -> None:
    """Refuse pictures behind the last one of the text; zeros are padding where prompts have a row each."""
    joined, left = form.axis == form.row_axis, range(end, array.shape[form.axis])
    if left and (joined or array.take(left, axis=form.axis).any()):
        than = "than the text" if joined else f"for prompt {row + 1} than the {count} of its text"
        raise RuntimeInputError(f"{name} is {list(array.shape)}, with more pictures {than}: give both together")
