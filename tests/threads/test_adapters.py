"""Adapters in several threads: a request keeps those that it began with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qeff_ir import QEffAutoPeftModelForCausalLM
from qeff_ir.errors import RuntimeInputError
from tests import support
from tests.adapters.random_adapters import base, make
from tests.threads.crowd import ASK, COUNT, PROMPTS, SHAPES, TARGETS, together
from tests.threads.test_requests import _Calls

NAMES = ("a", "b", None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[Path, Any]]:
    """Folder and PEFT's model by name; `None` for the base model."""
    made: dict[str | None, tuple[Path, Any]] = {None: (Path(), base("llama"))}
    for seed, name in enumerate(("a", "b", "c")):
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, make(base("llama"), folder, seed, r=4, target_modules=["q_proj", "down_proj", "lm_head"])
    return made


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["slots", "single"])
def test_every_request_has_its_own(target: str, mode: Any, adapters: dict[str | None, tuple[Path, Any]]) -> None:
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered("llama"))
    for name in ("a", "b"):
        model.load_adapter(adapters[name][0], name)
    model.compile(**TARGETS[target], **SHAPES, lora_mode=mode, adapter_slots=3)
    model.runner(threads=1)

    @functools.cache
    def theirs(name: str | None, index: int) -> torch.Tensor:
        return adapters[name][1].generate(input_ids=PROMPTS[index], **ASK)

    wanted = {(name, index): theirs(name, index) for name in NAMES for index in range(2)}
    assert not torch.equal(wanted["a", 1], wanted["b", 1]) and not torch.equal(wanted["a", 1], wanted[None, 1])

    def job(name: str | None, index: int) -> Callable[[], Any]:
        def asks() -> bool:
            # None by its own name: which adapter is active holds for all threads, and changes meanwhile
            return torch.equal(model.generate(PROMPTS[index], adapters=[name], **ASK), wanted[name, index])

        return asks

    def changes() -> None:
        model.load_adapter(adapters["c"][0], "c")
        model.set_adapter("c")
        model.delete_adapter("c")

    each = max(COUNT // 8, 1)
    jobs = [[job(NAMES[i % 3], i % 2)] * each for i in range(6)]
    assert together([[changes] * each, *jobs]) == []

    calls = _Calls(lambda: model.delete_adapter("a"))
    found = model.generate(PROMPTS[1], adapters=["a"], streamer=calls, **ASK)
    assert torch.equal(found, wanted["a", 1]) and "a" in model.adapters
    assert calls.raised and all(isinstance(error, RuntimeInputError) for error in calls.raised)
    if mode == "slots":  # what is set within a request is for the next one
        calls = _Calls(lambda: model.runner().decoder.lora_ids.fill(2))
        assert torch.equal(model.generate(PROMPTS[1], adapters=["a"], streamer=calls, **ASK), wanted["a", 1])
    calls = _Calls(lambda: model.use_adapters(["b"]))
    assert torch.equal(model.generate(PROMPTS[1], adapters=["a"], streamer=calls, **ASK), wanted["a", 1])
    assert calls.raised
    with model.runner().decoder.request():  # by hand it may be said
        model.use_adapters(["b"])
        tokens = [int(model.runner().decoder.prefill(PROMPTS[1].tolist()).argmax())]
    assert tokens == wanted["b", 1][0, PROMPTS[1].shape[1] :][:1].tolist()
