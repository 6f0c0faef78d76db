"""What transformers' ``get_*_features`` return: rows for placeholder tokens, in containers that differ by model.

Rows are in one tensor or in a list with one for each picture, and some models add rows for the hidden states of their
first layers (DeepStack). `Features` notes where they lie, so that the language model can be given rows of ours in the
very containers that it reads (as `transformers.generation` does where it cuts a long prompt).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from qeff_ir.errors import UnsupportedModelError

Tensor = torch.Tensor

DEEPSTACK = "deepstack_features"
_FIELDS = ("pooler_output", "last_hidden_state", DEEPSTACK)
"""Fields that may hold the rows: the first that a model fills does."""


_SAID = {"image": "a picture", "video": "a video", "audio": "a sound"}


@dataclass(frozen=True)
class Features:
    """The form of an encoder's output.

    Attributes:
        kind: The class of the output object; `None` where the rows are returned alone.
        field: The field of the rows; `DEEPSTACK` where all rows are for layers.
        listed: Whether they are in a list.
        rows: How many there are.
        width: Size of each.
        layers: One entry for each tensor of `DEEPSTACK`: the layer that it names, and whether it is in a list.
        also: Other fields that hold the very same rows.
        fixed: Other fields that hold a tensor which follows from weights alone.
    """

    kind: type[Any] | None
    field: str
    listed: bool
    rows: int
    width: int
    layers: tuple[tuple[int | None, bool], ...] = ()
    also: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def filled(self, rows: Tensor, layers: Sequence[Tensor], fixed: Mapping[str, Tensor]) -> Any:
        """An output object with these rows.

        Args:
            rows: ``[rows, width]``.
            layers: The same for each of `layers`.
            fixed: The tensors of `fixed`.
        """
        if self.kind is None:
            return _contained(rows, self.listed)
        fields: dict[str, Any] = {**dict.fromkeys(_needed_fields(self.kind)), **fixed}
        if self.field != DEEPSTACK:
            fields |= dict.fromkeys((self.field, *self.also), _contained(rows, self.listed))
        if self.layers:
            held = [_contained(r, listed) for r, (_, listed) in zip(layers, self.layers, strict=True)]
            fields[DEEPSTACK] = [
                one if layer is None else (layer, one) for one, (layer, _) in zip(held, self.layers, strict=True)
            ]
        return self.kind(**fields)


def _needed_fields(kind: type[Any]) -> list[str]:
    """The fields that an output object is not made without, whether or not a language model reads them."""
    found = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return [f.name for f in found if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


def encoder_of(model: PreTrainedModel, modality: str) -> Callable[..., Any]:
    """The method that encodes a modality: ``get_image_features``, say.

    Raises:
        UnsupportedModelError: The model has none.
    """
    name = f"get_{modality}_features"
    method = getattr(model.base_model, name, None) or getattr(model, name, None)
    if method is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {name}, by which models of transformers encode {_SAID[modality]} apart "
            "from the text: it cannot be split into an encoder and a language model"
        )
    return method


def encode(model: PreTrainedModel, modality: str, inputs: Mapping[str, Any]) -> Any:
    """The output object of an encoder."""
    method = encoder_of(model, modality)
    parameters = inspect.signature(method).parameters
    given = {name: value for name, value in inputs.items() if name in parameters}
    return method(**given, **({"return_dict": True} if "kwargs" in parameters else {}))


@contextlib.contextmanager
def replaced_encoder(model: PreTrainedModel, modality: str, made: Any) -> Generator[None]:
    """Let the encoder of a modality return something made already while the block lasts, whatever it is given."""
    name = f"get_{modality}_features"
    owners = [owner for owner in {id(m): m for m in (model.base_model, model)}.values() if hasattr(owner, name)]
    for owner in owners:
        vars(owner)[name] = lambda *_, **__: made
    try:
        yield
    finally:
        for owner in owners:
            del vars(owner)[name]


def read_features(model: PreTrainedModel, output: Any) -> tuple[Features, Tensor, list[Tensor]]:
    """The form of an output, its rows ``[rows, width]``, and those for layers.

    Raises:
        UnsupportedModelError: There are no rows in it, or those for layers differ in number.
    """
    if isinstance(output, Tensor | tuple | list):
        rows = _joined(output)
        return Features(None, "", not isinstance(output, Tensor), *_sizes(rows)), rows, []
    field = next((name for name in _FIELDS if output.get(name) is not None), None)
    deep: Sequence[Any] = output.get(DEEPSTACK) or ()
    layers = tuple((item[0], item[1]) if _names_layer(item) else (None, item) for item in deep)
    found = [_joined(item) for _, item in layers]
    held: Any = layers[0][1] if field == DEEPSTACK else output.get(field)
    if field is None or held is None:
        raise UnsupportedModelError(f"the encoder of {type(model).__name__} returns no rows ({', '.join(output)})")
    rows = _joined(held)
    if any(one.shape != rows.shape for one in found):
        raise UnsupportedModelError(
            f"the encoder of {type(model).__name__} returns rows {list(rows.shape)}, and others for its layers: they "
            "would not belong to the same tokens"
        )
    form = tuple((layer, not isinstance(item, Tensor)) for layer, item in layers)
    also = tuple(name for name in _FIELDS if name != field and output.get(name) is held)
    return Features(type(output), field, not isinstance(held, Tensor), *_sizes(rows), form, also), rows, found


def other_fields(output: Any, wanted: Callable[[Tensor], bool]) -> tuple[str, ...]:
    """The fields of an output that hold a tensor as wanted, those that may hold rows apart."""
    found = output.items() if isinstance(output, Mapping) else ()
    return tuple(name for name, held in found if name not in _FIELDS and isinstance(held, Tensor) and wanted(held))


def _names_layer(item: Any) -> bool:
    return isinstance(item, tuple) and isinstance(item[0], int)


def _joined(held: Any) -> Tensor:
    """Rows ``[rows, width]`` of a tensor or of several."""
    parts = [held] if isinstance(held, Tensor) else list(cast("Sequence[Tensor]", held))
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _sizes(rows: Tensor) -> tuple[int, int]:
    return int(rows.shape[0]), int(rows.shape[1])


def _contained(rows: Tensor, listed: bool) -> Any:
    return [rows] if listed else rows.unsqueeze(0)
