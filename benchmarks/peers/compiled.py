"""transformers' fast way: a static cache and `torch.compile`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, StaticCache

from benchmarks.peers.contender import Rows
from benchmarks.peers.eager import next_tokens


class Compiled:
    """Decode steps through `torch.compile`, prefill eager as in `generate`; the first step compiles.

    Args:
        model: The model.
        ctx_len: Tokens that the cache has room for.
    """

    name = "transformers, static cache + torch.compile"
    before: int | None = None

    def __init__(self, model: PreTrainedModel, ctx_len: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=ctx_len)
        self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache.reset()
        return next_tokens(self.model, self.cache, rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return next_tokens(self.forward, self.cache, [[token] for token in tokens])
