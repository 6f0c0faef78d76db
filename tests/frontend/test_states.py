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


def test_a_cache_beside_nothing_is_kept_in_two_halves() -> None:
    positions, width, nothing = torch.zeros((2, 5), dtype=torch.long), torch.randn(2, 1, 5, 7), torch.zeros(2, 1, 5, 0)
    for given in ((width, nothing), (nothing, width)):
        layer = states.AttentionLayer(None, states._Held(positions, {}, 0))
        stored = layer.update(*given)
        assert all(torch.equal(one, other) for one, other in zip(stored, given, strict=True))
        assert layer.held.seen == {
            ("key", 0): ("batch_size", 1, "ctx_len", 4),
            ("value", 0): ("batch_size", 1, "ctx_len", 3),
        }
