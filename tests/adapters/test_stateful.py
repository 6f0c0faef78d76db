"""Adapters come, go and change hands between the runs of two sessions; every row answers as PEFT does, all the time.

The reference is one PEFT model and one cache for each row: what a row's earlier tokens were computed with stays, as it
does in the retained states.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import DynamicCache

from backends import backend_names
from qeff_ir import QEffAutoPeftModelForCausalLM, numerics
from qeff_ir.errors import AdapterError
from qeff_ir.frontend.versions import CACHE
from tests import support
from tests.adapters.random_adapters import base, make

NAME = "llama"
SLOTS = 2
BATCH = 3
POOL: dict[str, dict[str, Any]] = {
    "a": {"r": 1, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 4, "target_modules": "all-linear"},
    "c": {"r": 8, "target_modules": ["down_proj", "lm_head"], "use_rslora": True},
}
_kept = tempfile.TemporaryDirectory()
FOLDERS = {name: Path(_kept.name) / name for name in POOL}


@functools.cache
def peft_model() -> Any:
    """PEFT's model with all adapters of the pool."""
    first, *rest = POOL
    for seed, (name, config) in enumerate(POOL.items()):
        make(base(NAME), FOLDERS[name], seed, **config)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import copy

        model = PeftModel.from_pretrained(copy.deepcopy(base(NAME)), str(FOLDERS[first]), adapter_name=first)
        for name in rest:
            model.load_adapter(str(FOLDERS[name]), name)
    return model.eval()


@functools.cache
def package(target: str) -> Path:
    peft_model()
    model = QEffAutoPeftModelForCausalLM._opened(support.Lowered(NAME))
    for name in ("b", "c"):  # whose targets together are those of all
        model.load_adapter(FOLDERS[name], name)
    model.compile(target=target, emit_only=True, adapter_slots=SLOTS, batch_size=BATCH, prefill_seq_len=4, ctx_len=48)
    return model.package.folder


def opened(target: str = "onnxruntime") -> QEffAutoPeftModelForCausalLM:
    model = QEffAutoPeftModelForCausalLM.from_package(package(target))
    model.runner(threads=1)
    return model


class Row:
    """PEFT's side of a row."""

    def __init__(self) -> None:
        self.cache = DynamicCache(config=base(NAME).config)
        self.length = 0

    def step(self, tokens: list[int], adapter: str | None) -> np.ndarray:
        model = peft_model()
        if adapter is not None:
            model.set_adapter(adapter)
        self.length += len(tokens)
        with torch.no_grad():
            if adapter is None:
                with model.disable_adapter():
                    out = model(torch.tensor([tokens]), use_cache=True, **{CACHE: self.cache})
            else:
                out = model(torch.tensor([tokens]), use_cache=True, **{CACHE: self.cache})
        return out.logits[0, -1].numpy()


class Adapters(RuleBasedStateMachine):
    """Two sessions on one package; the second keeps one adapter and one answer."""

    target: ClassVar[str]

    @initialize()
    def start(self) -> None:
        self.ours, self.other = opened(self.target), opened(self.target)
        self.other.load_adapter(FOLDERS["b"], "b")
        self.other.use_adapters(["b", None, "b"])
        self.witness = support.prompts([5, 3, 2], seed=1)
        self.answer = self.other.runner().decoder.prefill(self.witness)
        self.runner = self.ours.runner()
        self.session = self.runner.decoder.session
        self.files = self.stamps()
        self.rows: list[Row] = []
        self.using: list[str | None] = [None] * BATCH
        self.bound = numerics.bound(numerics.depth(support.lowered(NAME)))

    def stamps(self) -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted(package(self.target).rglob("*"))]

    def agrees(self, logits: np.ndarray, expected: list[np.ndarray]) -> None:
        for ours, theirs in zip(logits, expected, strict=True):
            assert numerics.error_over_rms(ours, theirs) <= self.bound

    @rule(name=st.sampled_from(sorted(POOL)))
    def add(self, name: str) -> None:
        full = len(self.ours.adapters) == SLOTS and name not in self.ours.adapters
        try:
            self.ours.load_adapter(FOLDERS[name], name)
            assert not full
        except AdapterError:
            assert full and name not in self.ours.adapters

    @precondition(lambda self: self.ours.adapters)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.ours.adapters))
        self.ours.delete_adapter(name)
        self.using = [None if used == name else used for used in self.using]

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        choice = st.sampled_from([None, *self.ours.adapters])
        self.using = [data.draw(choice) for _ in range(BATCH)]
        self.ours.use_adapters(self.using)

    @rule(rows=st.lists(st.lists(st.integers(4, 96), min_size=1, max_size=9), min_size=BATCH, max_size=BATCH))
    def prefill(self, rows: list[list[int]]) -> None:
        self.rows = [Row() for _ in range(BATCH)]
        expected = [row.step(tokens, name) for row, tokens, name in zip(self.rows, rows, self.using, strict=True)]
        self.agrees(self.runner.decoder.prefill(rows), expected)

    @precondition(lambda self: self.rows and max(row.length for row in self.rows) < 48)
    @rule(tokens=st.lists(st.integers(4, 96), min_size=BATCH, max_size=BATCH))
    def decode(self, tokens: list[int]) -> None:
        expected = [row.step([token], name) for row, token, name in zip(self.rows, tokens, self.using, strict=True)]
        self.agrees(self.runner.decoder.decode(tokens), expected)

    @invariant()
    def the_session_is_the_same(self) -> None:
        assert self.ours.runner() is self.runner and self.runner.decoder.session is self.session
        assert self.stamps() == self.files

    @invariant()
    def the_other_session_answers_as_before(self) -> None:
        assert np.array_equal(self.other.runner().decoder.prefill(self.witness), self.answer)


@pytest.mark.parametrize("target", backend_names())
def test_adapters_never_disturb_each_other(target: str) -> None:
    machine = type("Adapters", (Adapters,), {"target": target})
    examples = settings().max_examples // 2
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=10))


def test_a_row_that_keeps_a_removed_adapter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from qeff_ir.adapters.slots import AdapterSlots

    def forget(self: AdapterSlots, name: str) -> None:
        self._names[self._names.index(name)] = None

    model, peft_rows = opened(), Row()
    model.load_adapter(FOLDERS["b"], "b")
    model.use_adapters(["b"] * BATCH)
    slot = model.runner().decoder.lora_ids.copy()
    monkeypatch.setattr(AdapterSlots, "remove", forget)
    model.delete_adapter("b")
    decoder = model.runner().decoder
    assert not decoder.lora_ids.any()
    decoder.lora_ids[:] = slot
    tokens = support.prompts([6])[0]
    error = numerics.error_over_rms(decoder.prefill([tokens] * BATCH)[0], peft_rows.step(tokens, None))
    assert error > 100 * numerics.bound(numerics.depth(support.lowered(NAME)))


def test_a_write_into_the_wrong_slot_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.onnxruntime.session import OrtSession

    write = OrtSession.write
    model = opened()
    model.load_adapter(FOLDERS["a"], "a")
    monkeypatch.setattr(OrtSession, "write", lambda s, n, d, slot=None: write(s, n, d, None if slot is None else 1))
    model.load_adapter(FOLDERS["b"], "b")
    model.use_adapters(["a"] * BATCH)
    tokens = support.prompts([6])[0]
    error = numerics.error_over_rms(model.runner().decoder.prefill([tokens] * BATCH)[0], Row().step(tokens, "a"))
    assert error > 100 * numerics.bound(numerics.depth(support.lowered(NAME)))
