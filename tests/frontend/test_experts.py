"""Experts that a loop calls are all called, with the numbers of the loop."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from qeff_ir import numerics
from qeff_ir.frontend.capture import experts
from qeff_ir.frontend.checkpoint.skeleton import fake_weights
from tests.models import build

EXPERTS, CHOSEN, WIDTH, TOKENS = 5, 2, 8, 7


class Looped(torch.nn.Module):
    """Experts as transformers' older modelling files write them; the last one gives back what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS - 1, WIDTH, WIDTH))
        self.called: list[int] = []

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        chosen = torch.nn.functional.one_hot(top_k_index, num_classes=EXPERTS).permute(2, 1, 0)
        for (expert,) in torch.greater(chosen.sum(dim=(-1, -2)), 0).nonzero():
            self.called.append(int(expert))
            place, token = torch.where(chosen[expert])
            state = hidden_states[token]
            state = state @ self.weight[expert] if int(expert) < EXPERTS - 1 else state
            out.index_add_(0, token, state * top_k_weights[token, place, None])
        return out


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Looped()


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of which none chooses expert 1, and all of them choose two different ones."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.tensor([0, 2, 3, 4])[torch.randperm(4, generator=generator)[:2]] for _ in range(TOKENS)])
    return torch.randn(TOKENS, WIDTH, generator=generator), index, torch.rand(TOKENS, CHOSEN, generator=generator) + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_every_expert_is_called_and_the_numbers_stay(seed: int) -> None:
    torch.manual_seed(seed)
    model: Any = Model()
    state, index, weights = routed()
    with torch.no_grad():
        expected = model.experts(state, index, weights)
        assert 1 not in model.experts.called
        model.experts.called.clear()
        with experts.unrolled(model):
            got = model.experts(state, index, weights)
            assert model.experts.called == list(range(EXPERTS))
            wrong = model.experts(state, index.roll(1, dims=0), weights)
        after = model.experts(state, index, weights)
    assert numerics.error_over_rms(got.numpy(), expected.numpy()) <= numerics.bound(1)
    assert numerics.error_over_rms(wrong.numpy(), expected.numpy()) > 0.1
    assert torch.equal(after, expected)


class ByName(torch.nn.ModuleDict):
    """Experts of a dictionary; the choice is ``[tokens, places, experts]``, and may have one in several places."""

    num_experts = EXPERTS

    def __init__(self) -> None:
        super().__init__({f"expert_{n}": torch.nn.Linear(WIDTH, WIDTH) for n in range(EXPERTS)})

    def forward(self, tokens: torch.Tensor, choice: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(tokens)
        chosen = choice.permute(2, 1, 0)
        for expert in torch.greater(chosen.sum(dim=(-1, -2)), 0).nonzero():
            place, token = torch.where(chosen[expert].squeeze(0))
            state = self[f"expert_{expert[0]}"](tokens[token])
            out.index_add_(0, token, state * shares[token, place, None])
        return out


def test_experts_of_a_dictionary_may_be_chosen_in_several_places() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(ByName())
    experts_of: Any = model[0]
    tokens, index, weights = routed()
    index[2, 1] = index[2, 0]
    choice = torch.nn.functional.one_hot(index, num_classes=EXPERTS)
    with torch.no_grad():
        expected = experts_of(tokens, choice, weights)
        with experts.unrolled(cast("PreTrainedModel", model)):
            got = experts_of(tokens, shares=weights, choice=choice)
    assert numerics.error_over_rms(got.numpy(), expected.numpy()) <= numerics.bound(2)


def test_a_router_that_is_cast_to_its_own_type_stays_as_it_is() -> None:
    """As routers do in each run; torch would make its parameters anew."""
    model = build("llama")[1]
    part = model.model.layers[0].mlp
    with fake_weights(model):
        held = list(part.parameters())
        assert part.to(torch.float32) is part and all(a is b for a, b in zip(held, part.parameters(), strict=True))


@pytest.mark.parametrize("own", [False, True])
def test_modules_are_put_back_when_something_fails(own: bool) -> None:
    """Also what somebody had put in the place of a module's method."""
    model: Any = Model()
    replaced = Looped().forward
    if own:
        model.experts.forward = replaced

    def fail() -> None:
        with experts.unrolled(model):
            assert vars(model.experts)["forward"] is not replaced
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert vars(model.experts).get("forward") is (replaced if own else None)
