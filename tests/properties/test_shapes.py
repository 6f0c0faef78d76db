"""Every shape that is declared is the one that a run gives, behind the last pass of either target (P5)."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import example, given
from hypothesis import strategies as st

from backends import find_backend
from qeff_ir.testing.build import build
from qeff_ir.testing.judge import explained, prepare
from qeff_ir.testing.recipe import Recipe
from qeff_ir.testing.strategies import recipes
from tests import support
from tests.properties import LONG, RICH, scaled

T = TypeVar("T")
TARGETS = ["onnxruntime", "ai100"]
ADAPTERS = ["", ",lora{n=3 rank=2 targets=.* bias=targets}", ",lora{mode=single rank=2}"]


def each_rich(test: Callable[..., T]) -> Callable[..., T]:
    """Decorator: the property is tried on `RICH` first, on both targets with and without adapters."""
    for given_ in itertools.product(RICH, TARGETS, ADAPTERS):
        test = example(*given_)(test)
    return test


@scaled(0.5)
@each_rich
@given(recipes(odd=None), st.sampled_from(TARGETS), st.sampled_from(ADAPTERS))
def test_p5_every_declared_shape_is_the_true_one(recipe: Recipe, target: str, adapters: str) -> None:
    """A runtime plans its buffers by these shapes; whatever a pass did not make, it left as it is now."""
    module = prepare(build(recipe).module, LONG)
    pipeline = find_backend(target).pipeline.replace("last-logits", f"last-logits{adapters}")
    with explained("P5 shapes", module, pipeline=pipeline, recipe=recipe, request=LONG):
        support.apply(module, pipeline)
        sizes = module.specializations[0].symbols
        feeds = support.random_feeds(module, sizes)
        feeds["input_ids"] %= recipe.vocab
        with tempfile.TemporaryDirectory() as folder:
            declared = support.assert_true_shapes(module, Path(folder), feeds, sizes)
        assert sum((sizes["batch_size"], sizes["seq_len"]) == s[:2] for s in declared) > 5
