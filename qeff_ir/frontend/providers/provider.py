"""What every place that a model comes from can say of it, whatever the model is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qeff_ir.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.frontend.checkpoint.processors import PartKind
    from qeff_ir.frontend.checkpoint.weights import Weights


class Provider(ABC):
    """Where a model comes from; `auto` is everywhere the auto class of transformers that makes it.

    Attributes:
        config: The model's configuration; of a part of a model, that of the part.
        trust_remote_code: Whether code that comes with the model may run.
        remote: That code, as ``auto_map`` names it: ``file.Class``, or ``repository--file.Class``.
    """

    config: PreTrainedConfig
    trust_remote_code: bool = False
    remote: Sequence[str] = ()

    @abstractmethod
    def part(self, config: PreTrainedConfig) -> Self:
        """A part of the model, by its configuration, which is one of those inside of the model's."""

    @abstractmethod
    def opened(self, auto: Any, *, partial: bool = False) -> tuple[PreTrainedModel, Weights]:
        """A model to be traced, with weights or without, and the tensors by the names of its parameters; none is read.

        Args:
            auto: The class.
            partial: Whether a checkpoint may lack weights; what reads them cannot be lowered then.

        Raises:
            ModelLoadError: The checkpoint is damaged or does not fit the configuration.
            UnsupportedModelError: The model cannot be made, or cannot be traced as it is.
        """

    @abstractmethod
    def reference(self, auto: Any, dtype: str = "float32") -> PreTrainedModel:
        """The transformers model itself, weights in memory, in a type of torch's by its name."""

    def decoded_here(self) -> bool:
        """Whether `reference` has quantized weights that were decoded by us: transformers does not load them here."""
        return False

    def processor_of(self, kind: PartKind) -> Any:
        """The part of the model's processor that makes numbers of pictures, videos or recordings.

        Raises:
            QeffError: There is none, or none that can be read.
        """
        raise ModelLoadError(f"{type(self.config).__name__} comes without a processor: give the model's")

    def identity(self) -> dict[str, Any] | None:
        """What determines a lowered graph, software versions apart, as JSON data; `None` if only lowering tells."""
        return None

    def weight_files(self) -> list[Path]:
        """The checkpoint's files; none for a model in memory."""
        return []

    @abstractmethod
    def save_side_files(self, folder: Path) -> None:
        """Put configuration, generation defaults and the tokenizer, where there is one, into `folder`."""
