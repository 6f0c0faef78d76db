"""What a language model is given beside tokens, positions and states: inputs of its graph, and how it takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qeff_ir.frontend.capture.states import CapturingCache
from qeff_ir.ir.ports import Role
from qeff_ir.ir.residents import DimValue

TYPES = "mm_token_type_ids"
"""Name of the input that says which tokens are of a picture (AI 100 contract §1.9)."""


@dataclass(frozen=True, slots=True)
class GivenPort:
    """One input or output of the graph.

    Attributes:
        name: In the graph.
        shape: Symbols and sizes.
        dtype: Its type.
        role: Its role.
    """

    name: str
    shape: tuple[DimValue, ...]
    dtype: torch.dtype
    role: Role


@dataclass
class Call:
    """One run of the model.

    Attributes:
        arguments: Keyword arguments of its forward pass beside tokens, positions and cache, or in the place of these.
        results: Values of the further outputs, once it has run.
    """

    arguments: dict[str, object]
    results: list[torch.Tensor]


class Given:
    """Nothing beside tokens; subclasses give more.

    Attributes:
        tokens: What the model calls the tokens.
        positions: What it calls their positions.
        inputs: Further inputs.
        outputs: Further outputs.
    """

    tokens: str = "input_ids"
    positions: str = "position_ids"
    inputs: tuple[GivenPort, ...] = ()
    outputs: tuple[GivenPort, ...] = ()

    @contextlib.contextmanager
    def calling(
        self, model: PreTrainedModel, values: Mapping[str, torch.Tensor], cache: CapturingCache
    ) -> Generator[Call]:
        """Around one run of the model.

        Args:
            model: The model.
            values: Of the inputs, by name.
            cache: The cache of the run, which has its positions.
        """
        yield Call({}, [])
