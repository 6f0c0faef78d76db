"""A model that can be lowered: a provider, which says where it comes from, times a task, which says what it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.frontend.providers.opening import open_provider
from qeff_ir.frontend.tasks import CAUSAL_LM, Task
from qeff_ir.ir.module import Module
from qeff_ir.package import MAIN

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from qeff_ir.frontend.checkpoint.weights import Weights
    from qeff_ir.frontend.providers.provider import Provider


class Source:
    """A model that can be lowered, here as a causal LM; each other kind of task has a subclass.

    Args:
        provider: Where the model comes from.
        task: What it is for.
    """

    def __init__(self, provider: Provider, task: Task = CAUSAL_LM) -> None:
        self.provider, self.task = provider, task

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.provider.config

    def auto_class(self) -> Any:
        """transformers' auto class that makes the model."""
        return self.task.auto_class()

    def opened(self) -> tuple[PreTrainedModel, Weights]:
        """A model to be traced, and its weights: see `Provider.opened`."""
        return self.provider.opened(self.auto_class())

    def lower(self) -> Module:
        """Lower the model; weights stay where they are.

        Raises:
            ModelLoadError: See `opened`.
            UnsupportedModelError: The model cannot be lowered.
        """
        from qeff_ir.frontend.export.lower import lower

        return lower(*self.opened())

    def programs(self) -> Mapping[str, Callable[[], Module]]:
        """The programs of the model's package by name, each with what lowers it; `MAIN` is one of them.

        All share the model's weights and its side files. Most models are one program.
        """
        return {MAIN: self.lower}

    def weights(self) -> Weights:
        """The tensors by the names of the parameters; none is read.

        Raises:
            ModelLoadError: See `opened`.
        """
        return self.opened()[1]

    def identity(self) -> dict[str, Any] | None:
        """What determines the lowered graphs: see `Provider.identity`."""
        return self.provider.identity()

    def weight_files(self) -> list[Path]:
        """The checkpoint's files: see `Provider.weight_files`."""
        return self.provider.weight_files()

    def reference(self, dtype: str = "float32") -> PreTrainedModel:
        """The transformers model itself: see `Provider.reference`."""
        return self.provider.reference(self.auto_class(), dtype)

    def decoded_here(self) -> bool:
        """Whether we decoded the weights of `reference`: see `Provider.decoded_here`."""
        return self.provider.decoded_here()

    def save_side_files(self, folder: Path) -> None:
        """Put what a package gets along with the model into `folder`: see `Provider.save_side_files`."""
        self.provider.save_side_files(folder)


def open_source(
    name_or_folder: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False, **hub: Any
) -> Source:
    """Open a causal LM: see `qeff_ir.frontend.providers.opening.open_provider`."""
    return Source(open_provider(name_or_folder, gguf_file=gguf_file, trust_remote_code=trust_remote_code, **hub))
