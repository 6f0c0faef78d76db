"""A target in one file, found by its entry point: compiled for, opened and generated with like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qeff_ir import QEFFAutoModelForCausalLM
from tests import support
from tests.test_backends import install


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_transformers_generates_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "reference", monkeypatch, "from tests.examples.reference_target import BACKEND")
    model = support.tiny(name)[1]
    ours = QEFFAutoModelForCausalLM(model)
    ours.compile(target="reference", prefill_seq_len=4, ctx_len=24, compile_dir=tmp_path / "package")
    assert ours.package.manifest.target == "reference"
    ids = torch.tensor([support.PROMPTS[1]])
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = support.generate(model, inputs=ids, attention_mask=torch.ones_like(ids), **kwargs)
    assert torch.equal(ours.generate(ids, **kwargs), expected)
    again = QEFFAutoModelForCausalLM.from_package(tmp_path / "package")
    assert np.array_equal(again.generate(ids, **kwargs).numpy(), expected.numpy())
