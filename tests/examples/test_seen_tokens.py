"""A kind of state that another distribution defines is kept, saved, emptied and checked without an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from backends import find_backend
from qeff_ir import QEFFAutoModelForCausalLM
from qeff_ir.arrays import Array
from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.passing import Pipeline, run_pipeline
from qeff_ir.runtime.decoder import Decoder
from tests import support
from tests.examples.seen_tokens import SEEN, RepetitionPenalty

PENALTY = 1.7


def opened(name: str, folder: Path, *, penalty: float = PENALTY, check: int = 1) -> tuple[Module, Decoder]:
    module, backend = support.canonical(name), find_backend("onnxruntime")
    run_pipeline(module, Pipeline.parse(support.rest_of("onnxruntime")).add(RepetitionPenalty(penalty)), check=check)
    backend.emit(module, folder, support.OPTIONS)
    return module, Decoder(backend.open(folder, threads=1))


def penalized(logits: Array, seen: list[list[int]]) -> Array:
    """transformers' own processor, row by row: rows have seen different numbers of tokens."""
    process: Any = RepetitionPenaltyLogitsProcessor(PENALTY)
    rows = [
        process(torch.tensor([s]), torch.from_numpy(row[None].copy()))[0] for s, row in zip(seen, logits, strict=True)
    ]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-next"])
def test_what_was_seen_in_any_chunk_is_penalized(name: str, tmp_path: Path) -> None:
    plain = support.open_decoder(support.canonical(name), tmp_path / "plain")
    module, own = opened(name, tmp_path / "own")
    assert [s.kind for s in module.states].count(SEEN.name) == 1
    tokens: list[int] = []
    for prompts in (support.PROMPTS, support.PROMPTS[::-1]):  # the second request has seen nothing of the first
        seen = [list(p) for p in prompts]
        expected = penalized(plain.prefill(prompts), seen)
        found = own.prefill(prompts)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        for _ in range(3):
            tokens = [int(t) for t in expected.argmax(-1)]
            seen = [[*s, t] for s, t in zip(seen, tokens, strict=True)]
            expected = penalized(plain.decode(tokens), seen)
            found = own.decode(tokens)
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - plain.decode(tokens)).max() > 1e-3


def test_transformers_generates_the_same(tmp_path: Path) -> None:
    model = support.tiny("llama")[1]
    ours = QEFFAutoModelForCausalLM(model)
    own = Pipeline.parse(find_backend("onnxruntime").pipeline).add(RepetitionPenalty(PENALTY))
    ours.compile(target="onnxruntime", prefill_seq_len=2, ctx_len=24, pipeline=own, compile_dir=tmp_path / "package")
    ids = torch.tensor([support.PROMPTS[1]])
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = support.generate(model, inputs=ids, repetition_penalty=PENALTY, **kwargs)
    assert torch.equal(ours.generate(ids, **kwargs), expected)
    assert not torch.equal(support.generate(model, inputs=ids, **kwargs), expected)


def test_the_checks_drive_it_as_any_other(tmp_path: Path) -> None:
    """A factor of 1 changes nothing, through prefill and decode; any other is told."""
    module, _ = opened("llama", tmp_path / "same", penalty=1.0, check=4)
    assert [s.kind for s in module.states].count(SEEN.name) == 1
    with pytest.raises(PassError, match=r"repetition-penalty: .* changed behavior"):
        opened("llama", tmp_path / "other", check=4)
