"""What transformers is asked while a model of pictures is verified."""

from __future__ import annotations

import numpy as np
import torch

from qeff_ir.cli.verify_pictures import _follow
from qeff_ir.testing.trace import _grown
from tests import multimodal


def test_an_answer_that_is_followed_is_given_token_by_token() -> None:
    follow = _follow(np.array([7, 3]), 2)
    scores = torch.arange(9.0)[None]
    given = [int(follow(torch.zeros(1, length, dtype=torch.int64), scores).argmax()) for length in (2, 3)]
    assert given == [7, 3]


def test_new_tokens_have_types() -> None:
    beside = {"token_type_ids": torch.tensor([[0, 1, 1, 0]]), "pixel_values": torch.ones(1, 3)}
    grown = _grown(multimodal.lively("gemma3"), beside, 2)
    assert grown["token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0]]
    assert grown["pixel_values"] is beside["pixel_values"]
    assert _grown(multimodal.lively("gemma3"), beside, 0) == beside
