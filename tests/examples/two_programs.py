"""A package of two programs over one checkpoint: a causal LM, and the same model's hidden states without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from qeff_ir.frontend.forward_source import ForwardFolder, ForwardOptions
from qeff_ir.frontend.source import FolderSource
from qeff_ir.frontend.tasks import CAUSAL_LM, EMBEDDING
from qeff_ir.ir.module import Module

HIDDEN = "hidden"
"""Name of the second program, and of its folder in the package."""


class WithHiddenStates(FolderSource):
    """A model folder that is compiled into both programs.

    Args:
        folder: The folder.
    """

    task = replace(CAUSAL_LM, shapes=(*CAUSAL_LM.shapes, *EMBEDDING.shapes[:1]))

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._forward = ForwardFolder(folder, ForwardOptions())

    def programs(self) -> Mapping[str, Callable[[], Module]]:
        """See `qeff_ir.frontend.source.Source.programs`."""
        return {**super().programs(), HIDDEN: self._forward.lower}
