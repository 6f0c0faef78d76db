"""Encoder-decoder models: a package has an encoder, and a decoder given what that makes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qeff_ir.errors import CompileError, UnsupportedModelError
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.tasks import SEQ2SEQ, SPEECH_SEQ2SEQ, Task
from qeff_ir.ir.module import Module
from qeff_ir.package import DECODER, MAIN, encoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.frontend.inputs import InputSpec
    from qeff_ir.frontend.providers.provider import Provider

_SECONDS = 30
"""Longest recording where the feature extractor has none."""
_TOKENS = 128
"""Longest text where nobody says."""


class EncodedSource(Source):
    """An encoder-decoder model, see `for_length`; the provider of one of speech has its feature extractor.

    Args:
        provider: Where it comes from.
        task: What it is for.

    Attributes:
        specs: Inputs of the encoder in the longest form.
        shorter: The same for the decoders of shorter lengths, by their programs.
    """

    specs: Sequence[InputSpec] | None = None
    shorter: Mapping[str, Sequence[InputSpec]] = MappingProxyType({})

    def __init__(self, provider: Provider, task: Task = SEQ2SEQ) -> None:
        super().__init__(provider, task)

    def programs(self) -> Mapping[str, Callable[[], Module]]:
        """See `Source.programs`."""
        found: dict[str, Callable[[], Module]] = {MAIN: self.lower, encoder_of(MAIN): self.lower_encoder}
        for name, specs in self.shorter.items():
            one = copy.copy(self)
            one.specs = specs
            found |= {name: one.lower, encoder_of(name): one.lower_encoder}
        return found

    def for_length(self, encoder_ctx_len: int | Sequence[int] | None) -> EncodedSource:
        """The model, to be compiled for inputs of one length or of several; shorter texts are padded.

        Args:
            encoder_ctx_len: Tokens of a text, or positions of the encoder's output for a recording, or several of
                them. By default 128 tokens, and the longest recording that the feature extractor makes features of
                (30 seconds, if it says nothing).

        Raises:
            CompileError: The model takes no such length.
            UnsupportedModelError: The model is no encoder-decoder.
        """
        from qeff_ir.frontend.export.encoded import given_length

        model = self.opened()[0]
        if not model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no encoder of its own: open it with the class for what it does "
                "(QEFFAutoModelForImageTextToText, if it gives tokens the place of what it hears)"
            )
        several = [encoder_ctx_len] if isinstance(encoder_ctx_len, int | None) else sorted(set(encoder_ctx_len))[::-1]
        found = copy.copy(self)
        if self.task is SPEECH_SEQ2SEQ:
            extractor = self.provider.processor_of("AutoFeatureExtractor")
            known = [_of_recording(model, extractor, length) for length in several]
        else:
            known = [_of_text(model, length) for length in several]
        found.specs = known[0]
        found.shorter = {f"{DECODER}_{given_length(specs)}": specs for specs in known[1:]}
        return found

    def _known(self) -> Sequence[InputSpec]:
        if self.specs is None:
            raise CompileError("the length of what is encoded is not known: give encoder_ctx_len")
        return self.specs

    def identity(self) -> dict[str, Any] | None:
        """See `Source.identity`; with the length."""
        known = super().identity()
        if known is None:
            return None
        every = [self._known(), *self.shorter.values()]
        return {**known, "encoder": [[s.name, str(s.dtype), list(s.shape)] for specs in every for s in specs]}

    def lower(self) -> Module:
        """Lower the decoder; see `Source.lower`."""
        from qeff_ir.frontend.export.encoded import lower_decoder

        return lower_decoder(*self.opened(), self._known())

    def lower_encoder(self) -> Module:
        """Lower the encoder; see `Source.lower`."""
        from qeff_ir.frontend.export.encoded import lower_encoder

        return lower_encoder(*self.opened(), self._known())


def _of_text(model: PreTrainedModel, length: int | None) -> list[InputSpec]:
    import torch

    from qeff_ir.frontend.export.encoded import MASK
    from qeff_ir.frontend.inputs import BATCH, InputSpec, positions

    most = positions(model)
    length = min(_TOKENS, most or _TOKENS) if length is None else length
    if most is not None and length > most:
        raise CompileError(
            f"encoder_ctx_len={length} is more than the {most} positions of {type(model).__name__}: use {most} or less"
        )
    return [InputSpec(name, torch.int64, (BATCH, length)) for name in ("input_ids", MASK)]


def _of_recording(model: PreTrainedModel, extractor: Any, length: int | None) -> list[InputSpec]:
    """Features of the longest recording that the encoder makes no more than `length` positions of."""
    from qeff_ir.frontend.export.encoded import MASK, encoded_length
    from qeff_ir.frontend.inputs import BATCH, InputSpec

    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int):
        raise CompileError(f"{type(extractor).__name__} makes no features of a recording: give the model's processor")
    silence = np.zeros(rate * int(getattr(extractor, "chunk_length", None) or _SECONDS), dtype=np.float32)
    made = extractor(silence, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    main = str(model.get_encoder().main_input_name)
    if main not in made:
        raise CompileError(f"{type(extractor).__name__} makes no {main}, which {type(model).__name__} takes")
    features = made[main].float()
    whole = made[MASK].shape[1] if MASK in made else max(features.shape[1:])
    axis = 1 + list(features.shape[1:]).index(whole)

    def specs(size: int) -> list[InputSpec]:
        import torch

        shape = tuple(size if at == axis else int(n) for at, n in enumerate(features.shape))
        found = [InputSpec(main, torch.float32, (BATCH, *shape[1:]))]
        takes = MASK in inspect.signature(model.forward).parameters
        return [*found, InputSpec(MASK, torch.int64, (BATCH, size))] if takes else found

    if length is None or encoded_length(model, specs(whole)) == length:
        return specs(whole)
    low, high = 1, whole
    while low < high:  # the most features that make no more positions
        middle = (low + high + 1) // 2
        low, high = (middle, high) if encoded_length(model, specs(middle)) <= length else (low, middle - 1)
    if encoded_length(model, specs(low)) != length:
        raise CompileError(
            f"the encoder of {type(model).__name__} makes {encoded_length(model, specs(whole))} positions of the "
            f"longest recording and never {length}: give another encoder_ctx_len"
        )
    return specs(low)
