"""Experts that a model's code calls one by one, for the tokens that chose them: such a loop depends on the data.

transformers' own interface computes chosen experts alone, in a static form, and is used wherever a model goes through
it. A loop outside of it keeps the model's code, but runs every expert on every token; a token that did not choose an
expert gives it no weight. That is exact, and costs what all experts cost.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

Tensor = torch.Tensor

_ROUTED = {"top_k_index", "top_k_weights"}
"""Arguments by which transformers' experts take the choice: ``[tokens, chosen]`` both."""
_WHERE = torch.where
"""Transformers' exporters put a function of their own in its place while a model is traced."""


@contextlib.contextmanager
def unrolled(model: PreTrainedModel) -> Generator[None]:
    """Let experts that are called in a loop all be called, for as long as the block lasts.

    Args:
        model: Its modules with the arguments `top_k_index` and `top_k_weights` are the experts.
    """
    modules = [m for m in model.modules() if _is_routed(m) or _is_loop(m)]
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            mode = _EveryExpert(getattr(module, "num_experts", None), several=not _is_routed(module))
            module.forward = _for_every_token(module.forward, mode)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def _is_routed(module: torch.nn.Module) -> bool:
    return set(inspect.signature(module.forward).parameters) >= _ROUTED


def _is_loop(module: torch.nn.Module) -> bool:
    """Whether a dictionary of experts is called with tokens, the choice of each, and its weights."""
    own = isinstance(module, torch.nn.ModuleDict) and hasattr(module, "num_experts")
    return own and len(inspect.signature(module.forward).parameters) == len(_ROUTED) + 1


def _for_every_token(forward: Callable[..., Tensor], mode: _EveryExpert) -> Callable[..., Tensor]:
    names = list(inspect.signature(forward).parameters)[: len(_ROUTED) + 1]

    def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
        given = dict(zip(names, args, strict=False), **kwargs)
        tokens, choice, weights = (given[name] for name in names)
        nothing = torch.zeros_like(weights[:, :1])
        with mode:
            return forward(tokens, choice, torch.cat([weights, nothing], dim=-1))

    return call


class _EveryExpert(TorchFunctionMode):
    """What a loop over experts asks torch, answered without looking at the data.

    The choice is spread by `one_hot`; `nonzero` of what that comes to gives the experts, so all of them; and `where` of
    one expert's ``[chosen, tokens]`` gives its tokens, so all of them, each with the place of the expert among what it
    chose, or with the place behind these, where the weights have a zero.

    Args:
        experts: How many there are; `one_hot` tells, where that is not known.
        several: Whether a token may choose an expert in several places: each is then a token by itself.
    """

    def __init__(self, experts: int | None, *, several: bool = False) -> None:
        super().__init__()
        self.experts, self.several = experts, several

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot and self.experts is None:
            self.experts = int(kwargs.get("num_classes", args[-1]))
        elif func in (torch.Tensor.nonzero, torch.nonzero):
            every = range(self.experts or 0)
            return [[expert] for expert in every] if self.several else [torch.tensor([expert]) for expert in every]
        elif func is _WHERE and len(args) == 1:
            chosen = args[0] != 0
            if self.several:
                places, tokens = (torch.arange(size) for size in chosen.shape)
                place = torch.where(chosen, places[:, None], chosen.shape[0])
                return place.reshape(-1), tokens.expand(chosen.shape).reshape(-1)
            place = torch.where(chosen.any(dim=0), chosen.long().argmax(dim=0), chosen.shape[0])
            return place, torch.arange(chosen.shape[1])
        return func(*args, **kwargs)
