"""A language model that is given the rows of an encoder: transformers' own ``forward`` with ``mm_encoder_outputs``.

Where a forward pass does not take those (most models of sound), the method that encodes returns the rows.

Beside the rows, some models take places of tokens on three axes, and some let the tokens of a picture see one another,
which tokens those are being an input too. Both are asked of the model, not of its name.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import reset_model_state

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend import private
from qeff_ir.frontend.capture.attention import captured
from qeff_ir.frontend.capture.following import Following
from qeff_ir.frontend.capture.merging import Merging, named_tokens
from qeff_ir.frontend.capture.own_thread import alone, replaced
from qeff_ir.frontend.capture.states import CapturingCache
from qeff_ir.frontend.checkpoint.skeleton import evaluating, fake_weights
from qeff_ir.frontend.checkpoint.weights import Weights
from qeff_ir.frontend.export.blocks import find_blocks
from qeff_ir.frontend.export.encoders import ROWS as NAMES
from qeff_ir.frontend.export.encoders import Example, fixed_fields
from qeff_ir.frontend.export.features import DEEPSTACK, Features, encoder_of, replaced_encoder
from qeff_ir.frontend.export.given import TYPES, Call, Given, GivenPort
from qeff_ir.frontend.export.lower import Step, example_inputs, lower
from qeff_ir.frontend.export.own_code import as_unsupported, attributes_kept
from qeff_ir.frontend.export.quiet import quiet
from qeff_ir.frontend.private import export_patches
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import AXES, FIRST_ROW, NEXT_ROW, PICTURE_TOKENS, PLANES, ROUTED_TOKENS, ROWS, Role

Tensor = torch.Tensor

PLACES = "rope_position_ids"
"""Name of the input for places on three axes, until a target joins them to the positions."""

_ENCODED = "mm_encoder_outputs"
"""What a forward pass calls the outputs of encoders; without it, the encoder's method is replaced while it runs."""

_ENCODED_MODALITIES = ("image", "video")
"""What transformers' generation gives in it (`transformers.generation.utils`)."""

_TYPE_ARGUMENTS = ("token_type_ids", TYPES)
"""What a forward pass calls the input that says which tokens are of a picture."""


class Pictures(Given):
    """Rows of pictures, and what a model wants to know of their tokens.

    Args:
        model: The model.
        modality: ``image``, ``video`` or ``audio``.
        features: The form of its encoder's output, for one picture.
        count: Pictures that the context may hold.
        example: What the model's processor makes of one.
        kinds: Role of the types of tokens; `None` where no mask depends on them.

    Raises:
        UnsupportedModelError: The model has no way in for rows, gives tokens places on another number of axes, or takes
            types of tokens for another use.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modality: str,
        features: Features,
        count: int,
        example: Example,
        *,
        kinds: Role | None = PICTURE_TOKENS,
    ) -> None:
        name, parameters = type(model).__name__, inspect.signature(model.forward).parameters
        taken = _ENCODED in parameters and modality in _ENCODED_MODALITIES
        self.taken = _ENCODED if taken else _shared(model, modality)
        if self.taken is None:
            raise UnsupportedModelError(
                f"{name} takes no {_ENCODED}, by which models of transformers are given what their encoder made, nor "
                f"what get_{modality}_features takes: it cannot be split into an encoder and a language model"
            )
        other = next((n for n in parameters if n.endswith("token_type_ids") and n not in _TYPE_ARGUMENTS), None)
        with attributes_kept(model):
            axes = _axes(model, modality, features, example)
        if axes not in (1, AXES, AXES + 1):
            raise UnsupportedModelError(
                f"{name} gives tokens places on {axes} axes: only {AXES}, with or without the position in the text, or "
                "that alone are known"
            )
        self.modality, self.features, self.axes, self._example = modality, features, axes, example
        self.types = next((n for n in _TYPE_ARGUMENTS if n in parameters), None) if kinds else None
        self.routes, role = other, kinds if self.types else ROUTED_TOKENS
        shape = ("batch_size", count * features.rows, features.width)
        layers = (len(features.layers), *shape)
        found = [
            GivenPort(NAMES[modality], shape, torch.float32, ROWS),
            *([GivenPort(DEEPSTACK, layers, torch.float32, ROWS)] if features.layers else []),
            GivenPort("image_idx", ("batch_size", 1), torch.int64, FIRST_ROW),
            *([GivenPort(PLACES, (AXES, "batch_size", "seq_len"), torch.int64, PLANES)] if axes > 1 else []),
            *(
                [GivenPort(TYPES, ("batch_size", "seq_len"), torch.int64, role)]
                if role and (self.types or other)
                else []
            ),
        ]
        self.inputs = tuple(found)
        self.outputs = (GivenPort("image_idx_output", ("batch_size", 1), torch.int64, NEXT_ROW),)

    @contextlib.contextmanager
    def calling(self, model: PreTrainedModel, values: Mapping[str, Tensor], cache: CapturingCache) -> Generator[Call]:
        """See `Given.calling`."""
        token = getattr(model.config, f"{self.modality}_token_id", None)
        known = named_tokens(model.config) if token is None else {token, *named_tokens(model.config)}
        merging = Merging(values["image_idx"], values[NAMES[self.modality]].shape[1], known)
        made, arguments = self._filled(model, values), dict[str, object](dict.fromkeys(_needed(model.forward)))
        encoder: AbstractContextManager[None] = contextlib.nullcontext()
        if self.taken == _ENCODED:
            arguments[_ENCODED] = {self.modality: made}
        elif self.taken is not None:  # there is something to encode, and what the encoder returns is known
            arguments[self.taken] = values[NAMES[self.modality]]
            encoder = replaced_encoder(model, self.modality, made)
        if self.axes > 1:
            first = [cache.position_ids[None]] if self.axes > AXES else []
            arguments["position_ids"] = torch.cat([*first, values[PLACES]])
        if self.types is not None:
            cache.of_run = _by_position(torch.ones_like(cache.position_ids), cache)
            arguments[self.types] = _by_position(values[TYPES], cache)
        if self.routes is not None:
            arguments[self.routes] = values[TYPES]
            merging.note(values[TYPES])
        call = Call(arguments, [])
        with replaced(os, "getenv", private.unchecked), encoder, merging.capturing():
            yield call
        if merging.next is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} puts rows of its encoder in no place of a token: this way in is not captured"
            )
        call.results.append(merging.next)

    def _filled(self, model: PreTrainedModel, values: Mapping[str, Tensor]) -> Any:
        """The encoder's output made of the inputs, rows of all rows of the batch after one another."""
        rows, features = values[NAMES[self.modality]], self.features
        layers = values.get(DEEPSTACK)
        flat = [] if layers is None else [layer.reshape(-1, features.width) for layer in layers.unbind(0)]
        fixed = fixed_fields(model, self._example, self.modality, features.fixed) if features.fixed else {}
        return features.filled(rows.reshape(-1, features.width), flat, fixed)


def _axes(model: PreTrainedModel, modality: str, features: Features, example: Example) -> int:
    """On how many axes tokens have places: in a prompt of one picture, or of words where that is not known."""
    token = getattr(model.config, f"{modality}_token_id", None)
    numbers = {name: value for name, value in example.items() if not value.is_floating_point()}
    if token is None or not numbers:
        return private.axes_of_positions(model)
    if modality == "video":  # whose frames may stand apart in a prompt; text tells the axes as well
        return private.axes_of_positions(model)
    ids = torch.tensor([[1, *[token] * features.rows, 1]])
    return private.axes_of_positions(model, ids, {**numbers, TYPES: (ids == token).long()})


def _shared(model: PreTrainedModel, modality: str) -> str | None:
    """What both a forward pass and the encoder in it take, the first of such arguments."""
    if not any(hasattr(owner, f"get_{modality}_features") for owner in (model.base_model, model)):
        return None
    taken = inspect.signature(model.forward).parameters
    return next((name for name in inspect.signature(encoder_of(model, modality)).parameters if name in taken), None)


def _needed(forward: Callable[..., Any]) -> list[str]:
    """What a forward pass wants beside tokens, whatever it is: pixels, which it does not read if it has rows."""
    parameters = inspect.signature(forward).parameters.values()
    named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return [parameter.name for parameter in named if parameter.name != "input_ids"]


def _by_position(types: Tensor, cache: CapturingCache) -> Tensor:
    """The types of the tokens of this run, ``[batch, seq]``, at their positions in the context, ``[batch, ctx]``.

    Tokens of earlier runs count as text: a run that has a token of a picture has all of the picture.
    """
    whole = cache.whole_layer()
    if whole.slots is None:
        return types + 0
    return torch.ops.qeff.spread_tokens(whole.slots, types, cache.position_ids)


def lower_language(
    model: PreTrainedModel,
    weights: Weights,
    features: Features,
    modality: str = "image",
    count: int = 1,
    example: Example | None = None,
) -> Module:
    """Lower the language model of a multimodal one, given rows of its encoder.

    Args:
        model: As for `qeff_ir.frontend.export.lower.lower`.
        weights: As there.
        features: The form of what the encoder makes of one picture (`qeff_ir.frontend.export.encoders.find_features`).
        modality: ``image``, ``video`` or ``audio``.
        count: Pictures that the context may hold.
        example: What the model's processor makes of one picture, for models that give tokens places on axes only
            beside pictures.

    Returns:
        A module as of a causal LM, with further inputs ``vision_embeds`` ``[batch_size, count * rows, width]``, of some
        models ``deepstack_features`` ``[layers, batch_size, count * rows, width]``, ``rope_position_ids`` ``[3,
        batch_size, seq_len]`` and ``mm_token_type_ids`` ``[batch_size, seq_len]``; and ``image_idx``, which the output
        ``image_idx_output`` goes on from, both ``[batch_size, 1]``.

    Raises:
        UnsupportedModelError: See `Pictures`, `qeff_ir.frontend.export.blocks.find_blocks` and
            `qeff_ir.frontend.export.lower.lower`.
    """
    pictures = Pictures(model, modality, features, count, example or {})
    types = pictures.types if _masks_follow_types(model, pictures) else None
    kinds = None if types is None else find_blocks(model, types)
    if kinds is not None and pictures.routes is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {pictures.routes} beside {types}, by which its masks are made: only one "
            "input for types of tokens is known"
        )
    return lower(model, weights, given=Pictures(model, modality, features, count, example or {}, kinds=kinds))


def _masks_follow_types(model: PreTrainedModel, pictures: Pictures) -> bool:
    """Whether a mask depends on which tokens are of a picture, found by a run on fake tensors."""
    if pictures.types is None:
        return False
    with (
        alone(),
        evaluating(model),
        torch.no_grad(),
        captured(model),
        fake_weights(model) as fake,
        quiet(),
        attributes_kept(model),
        reset_model_state(model),
        export_patches(),
        as_unsupported(model, "cannot be run with a cache"),
        fake,
    ):
        ids, values = example_inputs(pictures)
        cache, follow = CapturingCache(model, ids, {}), Following([values[TYPES]])
        with follow:
            Step(model, [], pictures).run(ids, ids, cache, values)
    return any(mask in follow for mask in cache.masks)
