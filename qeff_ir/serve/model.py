"""What is served: a model that writes, or one that embeds, and the names by which requests ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qeff_ir.runtime.engine import Engine
from qeff_ir.serve.errors import ApiError
from qeff_ir.serve.guided import Guide

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qeff_ir.auto.embedding import QEFFAutoModel


@dataclass(frozen=True)
class Writer:
    """A model that writes.

    Attributes:
        engine: Runs it.
        tokenizer: The model's.
        stop_tokens: Those that end an answer.
        guide: Makes constraints of schemas.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: frozenset[int]
    guide: Guide


@dataclass(frozen=True)
class Served:
    """One package behind HTTP.

    Attributes:
        name: Of the model; of the base model where there are adapters.
        created: When it was opened, seconds since 1970.
        writer: The package as one that writes.
        embedder: The package as one that embeds.
        adapters: Slots of adapters, by the names that requests give as ``model``.
    """

    name: str
    created: int
    writer: Writer | None = None
    embedder: QEFFAutoModel | None = None
    adapters: Mapping[str, int] = field(default_factory=dict[str, int])

    def slot(self, model: str) -> int:
        """The slot of a model: 0, or that of its adapter.

        Raises:
            ApiError: There is no such model.
        """
        if model == self.name:
            return 0
        if model not in self.adapters:
            known = ", ".join((self.name, *self.adapters))
            message = f"there is no model '{model[:100]}' here: ask for one of {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.adapters[model]

    def to_write(self) -> Writer:
        """The package as one that writes.

        Raises:
            ApiError: It is one that embeds.
        """
        if self.writer is None:
            raise ApiError(400, f"{self.name} embeds texts and writes none: ask /v1/embeddings")
        return self.writer

    def to_embed(self) -> QEFFAutoModel:
        """The package as one that embeds.

        Raises:
            ApiError: It is one that writes.
        """
        if self.embedder is None:
            raise ApiError(400, f"{self.name} writes texts and embeds none: ask /v1/completions")
        return self.embedder
