"""Models without a cache, of which one forward pass is lowered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.tasks import EMBEDDING, Task
from qeff_ir.ir.module import Module
from qeff_ir.runtime.text_settings import TextSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qeff_ir.frontend.checkpoint.weights import Weights
    from qeff_ir.frontend.inputs import InputSpec, Wanted
    from qeff_ir.frontend.providers.provider import Provider


@dataclass(frozen=True)
class ForwardOptions:
    """How a forward pass is lowered.

    Attributes:
        task: What it is for.
        inputs: See `qeff_ir.frontend.inputs.find_inputs`.
        part: Name of the configuration of a part of the model (``vision`` for ``vision_config``), to take only that.
        pooling: The user's own, called with the first output and the attention mask; its result is the only output.
        texts: What is done to texts, kept in the package.
    """

    task: Task = EMBEDDING
    inputs: Wanted | None = None
    part: str | None = None
    pooling: Callable[..., torch.Tensor] | None = None
    texts: TextSettings = field(default_factory=TextSettings)


class ForwardSource(Source):
    """A model whose forward pass is lowered as it is.

    Of an encoder-decoder model, the encoder is taken. Weights that a checkpoint lacks cost only the outputs that need
    them.

    Args:
        provider: Where the model comes from.
        options: What to take of it.

    Raises:
        ModelLoadError: It has no such part.
    """

    def __init__(self, provider: Provider, options: ForwardOptions) -> None:
        if options.part is not None:
            part = getattr(provider.config, f"{options.part}_config", None)
            if part is None:
                parts = sorted(n.removesuffix("_config") for n in provider.config.sub_configs) or ["none"]
                raise ModelLoadError(
                    f"{type(provider.config).__name__} has no part '{options.part}': there is {', '.join(parts)}"
                )
            provider = provider.part(part)
        super().__init__(provider, options.task)
        self.options = options

    def auto_class(self) -> Any:
        """transformers' class; for the encoder of an encoder-decoder, the one that makes only that, if there is one."""
        from transformers import AutoModelForTextEncoding
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

        encoder = self.task is EMBEDDING and getattr(self.config, "is_encoder_decoder", False)
        if encoder and type(self.config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
            return AutoModelForTextEncoding
        return super().auto_class()

    def opened(self) -> tuple[PreTrainedModel, Weights]:
        """See `Source.opened`; weights that the checkpoint lacks are left out."""
        return self.provider.opened(self.auto_class(), partial=True)

    def lower(self) -> Module:
        """See `Source.lower`."""
        whole, weights = self.opened()
        model = encoder_alone(whole)
        if model is not whole:
            prefix = next(n for n, m in whole.named_modules() if m is model) + "."
            weights = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        return _lowered(model, weights, self.options)

    def takes_tokens(self) -> bool:
        """Whether token ids are an input."""
        return any(i.name == "input_ids" for i in _inputs(encoder_alone(self.opened()[0]), self.options))

    def identity(self) -> dict[str, Any] | None:
        """See `Source.identity`; a pooling of the user's has none."""
        known = super().identity()
        if self.options.pooling is not None or known is None:
            return None
        return {**known, "forward": [self.task.auto, self.options.part, _described(self.options)]}

    def reference(self, dtype: str = "float32") -> PreTrainedModel:
        """See `Source.reference`."""
        return encoder_alone(super().reference(dtype))

    def save_side_files(self, folder: Path) -> None:
        """See `Source.save_side_files`; with what is done to texts."""
        super().save_side_files(folder)
        self.options.texts.write(folder)


def encoder_alone(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of an encoder-decoder model with both, else the model itself."""
    whole = getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder")
    return model.get_encoder() if whole else model


def _lowered(model: PreTrainedModel, weights: Any, options: ForwardOptions) -> Module:
    """The forward pass, with a recording's attention mask where padding changes nothing with it, but without."""
    from qeff_ir.frontend.export.forward import lower_forward
    from qeff_ir.frontend.export.padding import find_padding
    from qeff_ir.frontend.inputs import LENGTH, find_inputs

    inputs = _inputs(model, options)
    padding = find_padding(model, inputs, options.pooling)
    names = [spec.name for spec in inputs]
    takes = inspect.signature(model.forward).parameters
    padded = options.inputs is None and any(LENGTH in spec.shape for spec in inputs)
    if padded and "attention_mask" in takes and "attention_mask" not in names:
        masked = find_inputs(model, [*names, "attention_mask"])
        found = find_padding(model, masked, options.pooling)
        if found.sound > padding.sound:
            inputs, padding = masked, found
    return lower_forward(model, weights, inputs, pooling=options.pooling, padding=padding)


def _inputs(model: PreTrainedModel, options: ForwardOptions) -> list[InputSpec]:
    from qeff_ir.frontend.inputs import find_inputs

    return find_inputs(model, options.inputs)


def _described(options: ForwardOptions) -> Any:
    """The wanted inputs as JSON data."""
    if isinstance(options.inputs, Mapping):
        return {name: [str(value.dtype), list(value.shape)] for name, value in options.inputs.items()}
    return None if options.inputs is None else list(options.inputs)
