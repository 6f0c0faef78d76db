"""Requests to a compiled model of an encoder and a decoder: its sessions, some for each length that is encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import RuntimeInputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qeff_ir.runtime.encoded_decoder import EncodedDecoder


class EncodedRunner:
    """All sessions of a package.

    Args:
        lengths: The model that `generate` uses and its decoder, for each length; the first is the longest.

    Attributes:
        model: That of the longest length.
        decoder: Its decoder.
    """

    def __init__(self, lengths: Sequence[tuple[PreTrainedModel, EncodedDecoder]]) -> None:
        self.model, self.decoder = lengths[0]
        self._lengths = sorted(lengths, key=lambda one: math.prod(one[1].shape))

    def generate(self, inputs: torch.Tensor | Mapping[str, Any] | None, kwargs: dict[str, Any]) -> Any:
        """Answer one batch by the decoder for its length, once it is this thread's turn.

        Raises:
            RuntimeInputError: There is none for it; or see `qeff_ir.runtime.encoded_generation.generate`.
        """
        from qeff_ir.runtime.encoded_generation import generate

        name = self.decoder.feature_names[0]
        own = inputs.get(name) if isinstance(inputs, Mapping) else inputs
        model, decoder = self._for(name, kwargs.get(name) if own is None else own)
        with decoder.request():
            return generate(model, decoder, inputs, kwargs)

    def _for(self, name: str, features: Any) -> tuple[PreTrainedModel, EncodedDecoder]:
        """The shortest that takes what is given; the longest, where it has another form and is refused there."""
        shape: list[int] = list(getattr(features, "shape", []))
        if len(self._lengths) == 1 or len(shape) != 1 + len(self.decoder.shape):
            return self.model, self.decoder
        for model, decoder in self._lengths:
            if decoder.takes(shape):
                return model, decoder
        known = ", ".join(str([shape[0], *decoder.shape]) for _, decoder in self._lengths)
        raise RuntimeInputError(
            f"{name} is {shape}, and the model is compiled for {known}: let the processor pad it to one of these "
            "lengths, if the answer for the padded one is wanted, or give compile its encoder_ctx_len too"
        )
