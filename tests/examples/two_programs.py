"""A package of two programs over one checkpoint: a causal LM, and the same model's hidden states without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource
from qeff_ir.frontend.providers.folder import Folder
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.tasks import CAUSAL_LM, EMBEDDING
from qeff_ir.ir.module import Module

HIDDEN = "hidden"
"""Name of the second program, and of its folder in the package."""
BOTH = replace(CAUSAL_LM, shapes=(*CAUSAL_LM.shapes, *EMBEDDING.shapes[:1]))
"""What it is for: the options of `compile` have the shapes of both programs."""


class WithHiddenStates(Source):
    """A model folder that is compiled into both programs.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(Folder(folder), BOTH)
        self._forward = ForwardSource(self.provider, ForwardOptions())

    def programs(self) -> Mapping[str, Callable[[], Module]]:
        """See `qeff_ir.frontend.source.Source.programs`."""
        return {**super().programs(), HIDDEN: self._forward.lower}
