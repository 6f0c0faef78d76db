"""Whoever takes part in a race: reads prompts, then continues greedily, one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from qeff_ir.runtime.decoder import Decoder

Rows = list[list[int]]


class Contender(Protocol):
    """One way to run the model."""

    name: str

    def prefill(self, rows: Rows) -> list[int]:
        """Forget everything, read the prompts (all of one length), return each row's next token."""
        ...

    def step(self, tokens: list[int]) -> list[int]:
        """Append one token to every row, return each row's next token."""
        ...


class Ours:
    """A compiled package, driven by the runtime that users drive it with."""

    name = "qeff-ir, onnxruntime"

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def prefill(self, rows: Rows) -> list[int]:
        """See `Contender.prefill`."""
        return np.argmax(self.decoder.prefill(rows), axis=-1).tolist()

    def step(self, tokens: list[int]) -> list[int]:
        """See `Contender.step`."""
        return np.argmax(self.decoder.decode(tokens), axis=-1).tolist()


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
