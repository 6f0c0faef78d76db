"""How far a compiled model may lie from transformers: the bound of its depth, or what transformers allows itself.

``8 u sqrt(depth)`` holds for the tiny random models of the tests. A trained model amplifies rounding: transformers with
its cache and transformers without it lie further apart than that, although both are right. So a model's own spread is
measured, and four times as much is allowed; a wrong mask, scale or position is thousands of times above either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qeff_ir.numerics import bound, depth
from qeff_ir.testing.trace import Trace, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.arrays import Array
    from qeff_ir.ir.module import Module

_FACTOR = 4.0


@dataclass(frozen=True)
class Yardstick:
    """The largest ``max|error| / rms`` that still counts as agreement.

    Attributes:
        by_depth: The bound of the model's depth.
        own: Largest error of transformers with a cache against transformers without one.
    """

    by_depth: float
    own: float

    @classmethod
    def of(cls, depth: int, cached: Trace, reference: Trace, dtype: ir.DataType = ir.DataType.FLOAT) -> Yardstick:
        """That of a model of so many products in a row, from what transformers answers with a cache and without one.

        Raises:
            ValueError: The reference is empty, constant or not finite.
        """
        return cls(bound(depth, dtype), compare(cached, reference).error)

    @property
    def limit(self) -> float:
        """The larger of the bound and four times transformers' own error."""
        return max(self.by_depth, _FACTOR * self.own)

    def __str__(self) -> str:
        if self.limit == self.by_depth:
            return f"The bound is 8 u √depth = {self.limit:.1e}."
        return (
            f"The bound is {_FACTOR:.0f} × the {self.own:.1e} by which transformers with a cache differs from itself "
            f"without one (8 u √depth is {self.by_depth:.1e})."
        )


def measure(
    module: Module,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    reference: Trace,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> Yardstick:
    """The yardstick for one trace.

    Args:
        module: The model as it was lowered.
        model: The model in transformers.
        prompts: Those of the trace.
        reference: What transformers answers without a cache.
        dtype: What both compute in.

    Raises:
        ValueError: The reference is empty, constant or not finite.
    """
    rows = [_cached_logits(model, row, reference.tokens[:-1, i]) for i, row in enumerate(prompts)]
    logits = np.stack(rows, axis=1)
    return Yardstick.of(depth(module), Trace(logits.argmax(-1), logits), reference, dtype)


def _cached_logits(model: PreTrainedModel, prompt: Sequence[int], follow: Array) -> Array:
    """Logits after the prompt and after each token of `follow`, ``[steps, vocab]``, each from a run of one token."""
    import torch

    from qeff_ir.frontend.versions import next_cache

    start, tokens = list(prompt[:-1]), [prompt[-1], *follow.tolist()]
    logits: list[Array] = []
    with torch.no_grad():
        cache = next_cache(model, model(torch.tensor([start]), use_cache=True)) if start else {}
        for token in tokens:
            out = model(torch.tensor([[token]]), use_cache=True, **cache)
            cache = next_cache(model, out)
            logits.append(out.logits[0, -1].float().numpy())
    return np.stack(logits)
