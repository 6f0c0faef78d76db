"""A model that is lowered once, for several targets and for questions about the lowered module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_ir.frontend.source import Source
from qeff_ir.ir.module import Module
from qeff_ir.package import MAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.frontend.checkpoint.weights import Weights


class LoweredOnce(Source):
    """Another source, lowered on first use; every `lower` returns a copy of the same module."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.provider, source.task)
        self._source = source
        self._modules: dict[str, Module] = {}

    def lower(self) -> Module:
        """See `Source.lower`."""
        return self._once(MAIN, self._source.lower)

    def programs(self) -> Mapping[str, Callable[[], Module]]:
        """See `Source.programs`."""
        return {n: functools.partial(self._once, n, lower) for n, lower in self._source.programs().items()}

    def _once(self, program: str, lower: Callable[[], Module]) -> Module:
        if program not in self._modules:
            self._modules[program] = lower()
        return self._modules[program].clone()

    def opened(self) -> tuple[PreTrainedModel, Weights]:
        """See `Source.opened`."""
        return self._source.opened()

    def identity(self) -> dict[str, Any] | None:
        """See `Source.identity`."""
        return self._source.identity()

    def weight_files(self) -> list[Path]:
        """See `Source.weight_files`."""
        return self._source.weight_files()

    def reference(self, dtype: str = "float32") -> PreTrainedModel:
        """See `Source.reference`."""
        return self._source.reference(dtype)

    def save_side_files(self, folder: Path) -> None:
        """See `Source.save_side_files`."""
        self._source.save_side_files(folder)
