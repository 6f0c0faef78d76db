"""transformers in torch: as it comes, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks.peers.contender import Rows


class Eager:
    """transformers as it comes: SDPA attention and a cache that grows."""

    name = "transformers, eager"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: Any = None

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache = DynamicCache(config=self.model.config)
        return _next(self.model, self.cache, rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return _next(self.model, self.cache, [[token] for token in tokens])


class Compiled:
    """transformers' fast way: a static cache, decode steps through `torch.compile`, prefill eager as in `generate`.

    Args:
        model: The model.
        ctx_len: Tokens that the cache has room for.
        warmup: Prompts to compile with; raises what `torch.compile` raises.
    """

    name = "transformers, static cache + torch.compile"

    def __init__(self, model: PreTrainedModel, ctx_len: int, warmup: Rows) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=ctx_len)
        self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
        self.step(self.prefill(warmup))

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        self.cache.reset()
        return _next(self.model, self.cache, rows)

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return _next(self.forward, self.cache, [[token] for token in tokens])


@torch.no_grad()  # as in `generate`
def _next(forward: Callable[..., Any], cache: Any, rows: Rows) -> list[int]:
    out = forward(input_ids=torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1).tolist()
