"""An object that has answered is copied as one that has not: its sessions stay, and are opened again in the copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qeff_ir import QEFFAutoModel, QEFFAutoModelForCausalLM, QEffAutoPeftModelForCausalLM
from tests import support

WAYS: list[Callable[[Any], Any]] = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [QEFFAutoModelForCausalLM, QEffAutoPeftModelForCausalLM])
def test_a_decoder_that_has_answered(kind: Any, way: Callable[[Any], Any], tmp_path: Path) -> None:
    model = kind(support.tiny("llama")[1])
    model.compile(target="onnxruntime", ctx_len=32, compile_dir=tmp_path / "out")
    right = model.generate(IDS, max_new_tokens=4, do_sample=False)
    other = way(model)
    assert other._runner is None
    assert other.generate(IDS, max_new_tokens=4, do_sample=False).tolist() == right.tolist()
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).tolist() == right.tolist()


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle"])
def test_an_encoder_that_has_answered(way: Callable[[Any], Any], tmp_path: Path) -> None:
    model = QEFFAutoModel(support.tiny("llama")[1].model)
    model.compile(target="onnxruntime", seq_len=4, compile_dir=tmp_path / "out")
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    right, found = model.generate(given), way(model).generate(given)
    assert right.keys() == found.keys() and right
    for name, value in right.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
