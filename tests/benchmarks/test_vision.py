"""The race about pictures: who takes part answers alike, and who does not is told."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import typer

from benchmarks import vision
from benchmarks.result import Row
from qeff_ir.numerics import error_over_rms

NEW = 6
ROWS = 88
"""Of a picture: 4 x 4 places of the whole, and of the four tiles 8 lines of 8 places and an end."""


@pytest.fixture(scope="module")
def asked() -> tuple[Any, dict[str, Any]]:
    model, images = vision._model("tiny")
    return model, vision._question(images, (112, 112), 0, ROWS, 512)


def answer(contender: Any, given: dict[str, Any]) -> tuple[list[int], int]:
    """The new tokens, and how many were told."""
    times = vision._Times()
    found = contender.answer(
        given | {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "streamer": times}
    )
    return found[0, -NEW:].tolist(), len(times.tokens)


def test_openvino_answers_alike(asked: tuple[Any, dict[str, Any]]) -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed: it is in the extra 'bench'")
    model, given = asked
    peer: Any = vision._peer("openvino", model, given, 1)
    eager: Any = vision._peer("eager", model, given, 1)
    with torch.inference_mode():
        rows = model.model.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output[0]
    assert error_over_rms(peer.encode(given).numpy(), rows.numpy()) < 1e-4
    right = answer(eager, given)
    assert right[1] == NEW and len(set(right[0])) > 1
    assert answer(peer, given) == right
    assert answer(peer, given) == right  # of the first question, nothing is left


def test_who_is_missing_is_told(asked: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vision._NEEDS, "openvino", "no_such_package")
    assert vision._peer("openvino", *asked, 1) == Row("OpenVINO", missing="no_such_package is not installed")
    with pytest.raises(typer.BadParameter, match="there is no peer 'nobody': it is one of eager, openvino"):
        vision._wanted("eager,nobody")
