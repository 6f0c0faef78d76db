"""Compiling beside others: what a trace changes in transformers and torch is seen by its own thread alone."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from qeff_ir import QEFFAutoModel, QEFFAutoModelForCausalLM
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.source import Source
from qeff_ir.frontend.structure import structure
from qeff_ir.frontend.versions import CACHE
from tests import encoders, support
from tests.models import VOCAB
from tests.threads.crowd import COUNT, SHAPES, TARGETS, asking, compiled, often_interrupted, together

IDS = torch.tensor(support.prompts([12, 12], seed=4))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def lowering(name: str) -> None:
    Source(Memory(copy.deepcopy(support.tiny(name)[1]))).lower()


def forward(model: Any) -> list[torch.Tensor]:
    """All of a padded batch in one, and token by token with transformers' own cache."""
    with torch.no_grad():
        whole = model(IDS, attention_mask=MASK).logits[:, -1]
        cache = DynamicCache(config=model.config)
        model(IDS[:1, :-1], **{CACHE: cache})
        return [whole, model(IDS[:1, -1:], **{CACHE: cache}).logits[:, -1]]


@contextmanager
def meanwhile(work: Callable[[], Any]) -> Generator[Callable[[], bool]]:
    """Work in another thread; yields whether it goes on. What it raises is raised at the end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with often_interrupted():
        thread.start()
        try:
            yield thread.is_alive
        finally:
            thread.join(timeout=300)
    if raised:
        raise raised[0]
    assert not thread.is_alive()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_plain_model_is_right_all_the_time(attention: str) -> None:
    """One with windows too: transformers' exporter puts other functions into the layers of its cache."""
    plain = [copy.deepcopy(support.tiny(name)[1]) for name in ("llama", "mistral", "mamba")]
    for model in plain[:2]:
        model.set_attn_implementation(attention)
    wanted = [forward(model) for model in plain[:2]] + [[plain[2](IDS).logits[:, -1]]]
    count = 0
    with meanwhile(lambda: [lowering(name) for name in ("llama", "mamba")]) as working:
        while working() or count < 3:
            found = [forward(model) for model in plain[:2]]
            with torch.no_grad():
                found.append([plain[2](IDS).logits[:, -1]])
            for got, right in zip(chain(*found), chain(*wanted), strict=True):
                torch.testing.assert_close(got, right, rtol=0, atol=1e-5)
            count += 1
    assert count >= 10


def test_the_very_model_that_is_compiled_is_right_all_the_time_and_untouched() -> None:
    model = copy.deepcopy(support.tiny("qwen2")[1])
    wanted, count = forward(model), 0
    before = [(module, dict(vars(module))) for module in model.modules()]
    tables = [{**m._parameters, **m._buffers} for m in model.modules()]
    with meanwhile(lambda: Source(Memory(model)).lower()) as working:
        while working():
            for got, right in zip(forward(model), wanted, strict=True):
                torch.testing.assert_close(got, right, rtol=0, atol=1e-5)
            assert model.config._attn_implementation == "sdpa"
            count += 1
    assert count >= 5
    assert all(vars(module) == was for module, was in before)
    for module, table in zip(model.modules(), tables, strict=True):
        assert all(table[n] is t for n, t in {**module._parameters, **module._buffers}.items())


def test_a_copy_of_the_structure_shares_every_tensor_and_nothing_else() -> None:
    model = support.tiny("gemma2")[1]
    made = structure(model)
    assert made.config is not model.config and made.lm_head.weight is made.model.embed_tokens.weight
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = list(zip(made.parameters(), model.parameters(), strict=True))
    pairs += zip(made.buffers(), model.buffers(), strict=True)
    assert pairs and all(one is other for one, other in pairs)
    assert not {id(m) for m in made.modules()} & {id(m) for m in model.modules()}


def test_two_compile_at_once_and_a_third_the_same(tmp_path: Path) -> None:
    models = [copy.deepcopy(support.tiny(name)[1]) for name in ("llama", "llama", "qwen2")]

    def job(number: int) -> Callable[[], Any]:
        def compiles() -> None:
            made = QEFFAutoModelForCausalLM(models[number])
            made.compile(**TARGETS["onnxruntime"], **SHAPES, compile_dir=tmp_path / str(min(number, 1)))

        return compiles

    assert together([[job(2)], [job(0)], [job(0)]]) == []
    for name, folder in (("llama", "0"), ("qwen2", "1")):
        assert asking(QEFFAutoModelForCausalLM.from_package(tmp_path / folder), name, 0, 1)[0]() is True


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_models_answer_meanwhile(target: str) -> None:
    model = compiled("llama", target)
    jobs = [asking(model, "llama", i, max(COUNT // 8, 1)) for i in range(4)]
    assert together([[lambda: lowering("qwen2")], *jobs]) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_compilation_that_fails_leaves_everything_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(support.tiny("llama")[1])
    norm = type(model.model.norm)
    original, calls = norm.forward, []

    def forward_once(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            calls.append(1)
            raise error("in the middle")
        return original(self, x)

    def state() -> list[Any]:
        loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
        owners = (torch, torch.Tensor, torch.nn.Module, torch.nn.functional, torch.compiler, torch.onnx, DynamicCache)
        return [
            AttentionInterface._global_mapping, dict(AttentionInterface._global_mapping),
            AttentionMaskInterface._global_mapping, dict(AttentionMaskInterface._global_mapping),
            *(dict(vars(owner)) for owner in owners), list(warnings.filters), warnings.showwarning,
            *((log.level, list(log.filters), log.disabled) for log in loggers), logging.root.manager.disable,
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), model.training,
            model.config._attn_implementation,
        ]  # fmt: skip

    lowering("llama")  # imports what is imported once
    before = state()
    with monkeypatch.context() as patch:
        patch.setattr(norm, "forward", forward_once)
        with pytest.raises(BaseException, match="in the middle"):
            Source(Memory(model)).lower()
    assert calls
    after = state()
    for states in (after, before):
        states[4].pop("nan", None)  # not equal to itself
    for now, was in zip(after, before, strict=True):
        assert now == was
    lowering("llama")


def test_others_are_warned_while_this_thread_is_not() -> None:
    heard: list[logging.LogRecord] = []

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    from qeff_ir.frontend.export.quiet import quiet

    handler, log = Hears(), logging.getLogger("torch.onnx")

    def speak() -> None:
        log.warning("aloud")
        warnings.warn("aloud", UserWarning, stacklevel=1)

    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as seen, quiet():
            warnings.simplefilter("always", append=True)
            speak()
            assert not heard and not seen
            thread = threading.Thread(target=speak)
            thread.start()
            thread.join()
            assert len(heard) == len(seen) == 1
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize("target", TARGETS)
def test_embeddings(target: str) -> None:
    model = QEFFAutoModel(encoders.build("bert"), pooling="mean", normalize=True)
    model.compile(**TARGETS[target], seq_len=[8, 16], batch_size=2)
    model.encoder(threads=1)
    rng = np.random.default_rng(5)
    inputs = [{"input_ids": rng.integers(3, min(VOCAB, encoders.VOCAB), (1 + i % 3, 3 + i))} for i in range(8)]
    wanted = [model.generate(given)["output"] for given in inputs]

    def job(index: int) -> Callable[[], Any]:
        return lambda: np.array_equal(model.generate(inputs[index])["output"], wanted[index])

    assert together([[job(i)] * COUNT for i in range(8)]) == []
    assert len({w.tobytes() for w in wanted}) == 8
