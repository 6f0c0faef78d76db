"""transformers as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.peers.contender import Rows
from qeff_ir.frontend.versions import CACHE


class Eager:
    """SDPA attention and a cache that grows."""

    name = "transformers, eager"
    before: int | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: Any = None

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache = DynamicCache(config=self.model.config)
        return next_tokens(self.model, self.cache, rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return next_tokens(self.model, self.cache, [[token] for token in tokens])


@torch.no_grad()  # as in `generate`
def next_tokens(forward: Callable[..., Any], cache: Any, rows: Rows) -> list[int]:
    """Append tokens to a cache, return each row's next one; only the last position's logits are computed."""
    out = forward(input_ids=torch.tensor(rows), use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return out.logits[:, -1].argmax(-1).tolist()
