"""Requests to a compiled model of pictures and text: its sessions, and the rows of pictures that it has seen."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_ir.errors import RuntimeInputError, first_line
from qeff_ir.frontend.tasks import IMAGE_TEXT_TO_TEXT
from qeff_ir.ir.ports import ALL_PLANES, AXES, PLANES
from qeff_ir.ir.residents import KINDS
from qeff_ir.runtime.picture_form import PictureForm
from qeff_ir.runtime.picture_forms import Picture, PictureForms
from qeff_ir.runtime.read_out import read_out, real_rows, tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qeff_ir.arrays import Array
    from qeff_ir.runtime.generation import SessionLM
    from qeff_ir.runtime.picture_decoder import Pictured, PictureDecoder
    from qeff_ir.runtime.session import Session
    from qeff_ir.runtime.texts import GenerationResult

_KEPT = 256 << 20
"""Bytes of rows of pictures that are kept, so that the next question about one does not encode it again."""

_PIXELS = KINDS["pixels"].input
"""What a graph that has the encoder calls the pixels, whatever the processor does."""

_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What processors call the types of tokens; the first tells the pictures, whatever else the second may tell. Others
are for experts."""


class PictureRunner:
    """All sessions of a package, and the rows of the pictures that they have seen.

    Args:
        model: The language model.
        decoder: Its decoder.
        encoders: The encoders, by program; none where the decoder's graph has it.
        forms: What the processor makes of pictures.
        trust_remote_code: Whether code that came with the model may run.
    """

    def __init__(
        self,
        model: SessionLM,
        decoder: PictureDecoder,
        encoders: Mapping[str, Session],
        forms: PictureForms,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.model, self.decoder, self.forms = model, decoder, forms
        self._encoders, self._trust = encoders, trust_remote_code
        self._rows: OrderedDict[bytes, dict[str, Array]] = OrderedDict()
        self._skeleton: PreTrainedModel | None = None

    @property
    def running(self) -> bool:
        """Whether ``generate`` is running."""
        return self.model.running

    def generate(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        """Answer one batch, for a thread that has its turn."""
        from qeff_ir.runtime.generation import check_ids, check_mask

        given, ids = self._taken(kwargs), kwargs.get("input_ids")
        ids = check_ids(inputs if ids is None else ids)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self.model.inferred_mask(ids, kwargs)
        self.decoder.prompts = self._prompts(ids, check_mask(kwargs["attention_mask"], ids), given)
        try:
            return self.model.generate_now(inputs, **kwargs)
        finally:
            self.decoder.prompts = ()

    def last(self, kwargs: dict[str, Any], lora_ids: Sequence[int] | None = None) -> Array:
        """What the language model returns for the last token of each row that a processor made, of any number of rows.

        Args:
            kwargs: What it returns.
            lora_ids: Slot of each row's adapter; those of the decoder by default.

        Returns:
            float32 ``[rows, vocab]``, or ``[rows, features]`` of an embedding model.

        Raises:
            RuntimeInputError: An input does not fit the compiled model, or is not known.
        """
        given = self._taken(kwargs)
        ids, mask = tensors(kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None))
        rows = real_rows(ids, mask, self.model.vocabulary)
        for name in kwargs:
            raise RuntimeInputError(f"the model takes no {name}: give what the processor returns, and no more")
        prompts = self._prompts(ids, mask, given)

        def rows_of(batch: Sequence[int]) -> list[list[int]]:
            self.decoder.prompts = [prompts[number] for number in batch]
            return [rows[number] for number in batch]

        return self._read_out(len(rows), rows_of, lora_ids)

    def last_of_prompts(
        self,
        prompts: Sequence[str],
        images: object,
        processor: Any,
        *,
        resize: bool,
        lora_ids: Sequence[int] | None = None,
    ) -> Array:
        """As `last`, of prompts about pictures."""
        return self._read_out(len(prompts), self.reader(prompts, images, processor, resize=resize), lora_ids)

    def _read_out(
        self, count: int, rows_of: Callable[[Sequence[int]], list[list[int]]], lora_ids: Sequence[int] | None
    ) -> Array:
        try:
            return read_out(self.decoder, count, rows_of, lora_ids)
        finally:
            self.decoder.prompts = ()

    def _taken(self, kwargs: dict[str, Any]) -> dict[str, Array]:
        """What encoders take and types of tokens, out of a processor's output."""
        names = (*self.forms.inputs, *self.forms.beside)
        found = {name: kwargs.pop(name) for name in list(kwargs) if name in names or _tells_types(name)}
        return {name: _array(name, value) for name, value in found.items() if value is not None}

    def answer(
        self,
        prompts: Sequence[str],
        images: object,
        processor: Any,
        kwargs: dict[str, Any],
        *,
        resize: bool,
        lora_ids: Sequence[int] | None = None,
    ) -> GenerationResult:
        """Answer prompts about pictures, for a thread that has its turn.

        `lora_ids` are the slots of their adapters; those of the decoder stay by default.
        """
        from qeff_ir.runtime.picture_prompts import tokenizer_of
        from qeff_ir.runtime.texts import answer_rows

        rows_of = self.reader(prompts, images, processor, resize=resize, lora_ids=lora_ids)
        try:
            return answer_rows(self.model, len(prompts), rows_of, tokenizer_of(processor), kwargs)
        finally:
            self.decoder.prompts = ()

    def reader(
        self,
        prompts: Sequence[str],
        images: object,
        processor: Any,
        *,
        resize: bool,
        lora_ids: Sequence[int] | None = None,
    ) -> Callable[[Sequence[int]], list[list[int]]]:
        """What makes rows of a batch of prompts, by their numbers, and tells the decoder what they have beside tokens.

        Each prompt goes through the processor by itself.

        Args:
            prompts: The prompts.
            images: See `qeff_ir.runtime.picture_prompts.pictures_of`.
            processor: The model's.
            resize: Whether pictures that have none of the compiled sizes are resized to the nearest.
            lora_ids: Slots of their adapters; those of the decoder stay by default.

        Raises:
            RuntimeInputError: The package is for videos, or the processor or the pictures are something else.
        """
        from qeff_ir.runtime.picture_prompts import fitting, pictures_of, processed, tokenizer_of

        if self.forms.videos:
            raise RuntimeInputError("prompts are for pictures: give what processor(text=…, videos=…) returns")
        pictures, _ = pictures_of(images, len(prompts)), tokenizer_of(processor)

        def read(number: int) -> tuple[list[int], Pictured]:
            own = [fitting(self.forms, processor, picture, resize=resize) for picture in pictures[number]]
            made = processed(processor, prompts[number], [picture for picture, _ in own])
            known = {name for name in made if name in self.forms.inputs or _tells_types(name)}
            given = {name: _array(name, made[name]) for name in known}
            ids, mask = tensors(made["input_ids"], made.get("attention_mask"))
            (real,) = real_rows(ids, mask, self.model.vocabulary)  # some processors fill up a text alone, too
            return real, self._prompts(ids, mask, given, [[form for _, form in own]])[0]

        def rows_of(batch: Sequence[int]) -> list[list[int]]:
            known = {number: read(number) for number in dict.fromkeys(batch)}
            self.decoder.prompts = [known[number][1] for number in batch]
            if lora_ids is not None:
                self.decoder.lora_ids[:] = [lora_ids[number] for number in batch]
            return [known[number][0] for number in batch]

        return rows_of

    def _prompts(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        given: dict[str, Array],
        known: Sequence[Sequence[PictureForm]] | None = None,
    ) -> list[Pictured]:
        from qeff_ir.runtime.picture_decoder import Pictured

        real = mask.bool().numpy()
        tokens = [row[keep] for row, keep in zip(ids.numpy(), real, strict=True)]
        arrays = {name: value for name, value in given.items() if name in self.forms.inputs}
        pictures = self.forms.split(arrays, [row.tolist() for row in tokens], known)
        types = next((given[name] for name in _TYPES if name in given), None)
        routes = next((given[name] for name in given if _tells_types(name) and name not in _TYPES), types)
        for told in (types, routes):
            if told is not None and (told.shape != real.shape or not np.issubdtype(told.dtype, np.integer)):
                raise RuntimeInputError(
                    f"the types of tokens are {told.dtype} {list(told.shape)}, and the tokens {list(real.shape)}: give "
                    "a whole number for each"
                )
        beside = {name: given[name] for name in self.forms.beside if name in given}
        prompts, before = list[Pictured](), 0
        for row, own in enumerate(pictures):
            kinds = None if types is None else types[row][real[row]]
            routed = None if routes is None else routes[row][real[row]]
            numbers = {name: array[before : before + len(own)] for name, array in beside.items()}
            before += len(own)
            prompts.append(Pictured(self._encoded(own), self._planes(tokens[row], kinds, own, numbers), routed))
        return prompts

    def _encoded(self, pictures: Sequence[Picture]) -> dict[str, Array]:
        """Rows of the pictures of a prompt, one after the other, or their pixels where the decoder's graph encodes."""
        if pictures and not self._encoders:
            name, form = self.forms.sizes[0].pixels
            return {_PIXELS: np.concatenate([picture[name] for _, picture in pictures], axis=form.axis)}
        made = [self.encode(form, inputs) for form, inputs in pictures]
        return {name: np.concatenate([one[name] for one in made], axis=-2) for name in (made[0] if made else ())}

    def forget(self) -> None:
        """Forget the rows of all pictures."""
        self._rows.clear()

    def encode(self, form: PictureForm, picture: Mapping[str, Array]) -> dict[str, Array]:
        """Rows of one picture, ``[rows, width]`` or ``[layers, rows, width]`` by name; of one that was seen, the same.

        Args:
            form: The size of the picture.
            picture: What the processor made of it.
        """
        session = self._encoders[form.program]
        ports = session.interface.inputs
        feeds = {port.name: np.ascontiguousarray(picture[port.name], dtype=port.dtype) for port in ports}
        digest = hashlib.sha256(b"".join([form.program.encode(), *(feeds[port.name].tobytes() for port in ports)]))
        digest = digest.digest()
        if digest not in self._rows:
            made = session.run(feeds)
            self._rows[digest] = {name: np.squeeze(rows, axis=-3).astype(np.float32) for name, rows in made.items()}
            while len(self._rows) > 1 and sum(map(_bytes, self._rows.values())) > _KEPT:
                self._rows.popitem(last=False)
        self._rows.move_to_end(digest)
        return self._rows[digest]

    def _planes(
        self, ids: Array, types: Array | None, pictures: Sequence[Picture], beside: Mapping[str, Array]
    ) -> Array | None:
        """Places of a prompt's tokens, as the model itself finds them; `None` where it has none."""
        import torch

        from qeff_ir.frontend import private
        from qeff_ir.frontend.checkpoint.skeleton import empty_model

        interface = self.decoder.session.interface
        if not pictures or (interface.input(PLANES) is None and interface.input(ALL_PLANES) is None):
            return None
        if self._skeleton is None:
            auto = IMAGE_TEXT_TO_TEXT.auto_class()
            self._skeleton = empty_model(self.model.config, auto=auto, trust_remote_code=self._trust)
        arguments = {name: torch.from_numpy(array) for name, array in beside.items()}
        for name, form in self.forms.inputs.items():
            if form.numbers is not None:
                whole = np.concatenate([picture[name] for _, picture in pictures], axis=form.axis)
                arguments[name] = torch.from_numpy(whole)
        if types is not None:
            arguments["mm_token_type_ids"] = torch.from_numpy(types)[None]
        try:
            places = private.places(self._skeleton, torch.from_numpy(ids)[None], arguments)
        except Exception as error:  # it is the model's own code, on what a caller gives
            raise RuntimeInputError(
                f"the model cannot tell where the tokens of a prompt with {len(pictures)} pictures are "
                f"({first_line(error)}): give text and pictures as the model's processor returns them"
            ) from error
        return places[-AXES:, 0].numpy()


def _tells_types(name: str) -> bool:
    """Whether an argument is of the types of tokens."""
    return name.endswith("token_type_ids")


def _bytes(rows: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in rows.values())


def _array(name: str, value: Any) -> Array:
    """An argument as an array.

    Raises:
        RuntimeInputError: It is none.
    """
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise RuntimeInputError(f"{name} is no array ({error}): give what the processor returns") from error
