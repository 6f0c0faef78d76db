"""Cache layers are taken by their very classes: a subclass of a model's own may keep anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture import states
from tests.models import build


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-next", "falcon-h1", "mamba"])
def test_a_subclass_of_a_cache_layer_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, model), positions = build(name), torch.zeros((1, 1), dtype=torch.int64)
    known = len(DynamicCache(config=model.config).layers)
    assert len(states._layers(model, positions, {}, model.config.num_hidden_layers)) == known > 0

    def with_own(at: int) -> Any:
        def made(config: Any) -> DynamicCache:
            cache = DynamicCache(config=config)
            layer: Any = cache.layers[at]
            kind = type(layer)
            layer.__class__ = type("Own" + kind.__name__, (kind,), {})
            return cache

        return made

    for at in range(known):
        monkeypatch.setattr(states, "DynamicCache", with_own(at))
        with pytest.raises(UnsupportedModelError, match=rf"keeps a Own\w+ state in layer {at}, a kind of its own"):
            states._layers(model, positions, {}, model.config.num_hidden_layers)
