"""Pooling against its formulas in torch, in float64: padding on either side, holes in the mask, rows of padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qeff_ir.arrays import Array
from qeff_ir.errors import PassError
from qeff_ir.ir import dialect
from qeff_ir.ir.module import Dim, Module, Specialization
from qeff_ir.ir.printer import to_text
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from tests import support

ROWS, TOKENS, WIDTH = 7, 6, 8
MASK = np.array(
    [
        *([1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0] * 6),
        *([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]),
    ]
)
"""Full, padded on the right, on the left, with holes, nothing but padding, and one token on either side."""


def module(*, masked: bool = True) -> Module:
    """A module that hands its hidden states through."""
    hidden = ir.val("hidden", ir.DataType.FLOAT, ir.Shape(["batch_size", "seq_len", WIDTH]))
    mask = ir.val("attention_mask", ir.DataType.INT64, ir.Shape(["batch_size", "seq_len"]))
    first = ir.node("Neg", [hidden])
    copied = ir.node("Neg", [first.outputs[0]])
    out = copied.outputs[0]
    out.name, out.dtype, out.shape = "last_hidden_state", ir.DataType.FLOAT, hidden.shape
    graph = ir.Graph(
        [hidden, mask] if masked else [hidden],
        [out],
        nodes=[first, copied],
        opset_imports={"": dialect.OPSET},
        name="g",
    )
    made = Module(ir.Model(graph, ir_version=11), "Hidden")
    made.dims = {n: Dim(n) for n in ("batch_size", "seq_len")}
    made.specializations = [Specialization("Embedding", "forward", {"batch_size": ROWS, "seq_len": TOKENS})]
    made.write_facts()
    return made


def states(scale: float = 1.0) -> Array:
    return (np.random.default_rng(0).standard_normal((ROWS, TOKENS, WIDTH)) * scale).astype(np.float32)


def run(text: str, folder: Path, hidden: Array, *, masked: bool = True) -> Array:
    made = module(masked=masked)
    support.apply(made, text)
    feeds = {"hidden": hidden} | ({"attention_mask": MASK} if masked else {})
    found = support.run_graph(made, folder, feeds)["output"]
    declared = support.assert_true_shapes(made, folder / "shapes", feeds, made.specializations[0].symbols)
    assert found.shape in declared
    return found


def formula(mode: str, hidden: Array, mask: Array) -> Array:
    """The pooling of one row after another, over the tokens that count."""
    rows: list[torch.Tensor] = []
    for states, counted in zip(torch.tensor(hidden).double(), torch.tensor(mask).bool(), strict=True):
        x = states[counted]
        position = torch.arange(1, len(states) + 1)[counted].double()
        if len(x) == 0:
            rows.append(torch.zeros(WIDTH).double())
        elif mode == "mean":
            rows.append(x.mean(0))
        elif mode == "max":
            rows.append(x.max(0).values)
        elif mode == "cls":
            rows.append(x[0])
        elif mode == "last":
            rows.append(x[-1])
        elif mode == "mean-sqrt-len":
            rows.append(x.sum(0) / len(x) ** 0.5)
        else:
            weights = position - position[0] + 1
            rows.append((weights[:, None] * x).sum(0) / weights.sum())
    return torch.stack(rows).numpy()


MODES = ["mean", "max", "cls", "last", "mean-sqrt-len", "weighted-mean"]


@pytest.mark.parametrize("mode", MODES)
def test_poolings_follow_their_formulas(mode: str, tmp_path: Path) -> None:
    hidden = states()
    found = run(f"embedding{{pooling={mode}}}", tmp_path, hidden)
    np.testing.assert_allclose(found, formula(mode, hidden, MASK), rtol=2e-6, atol=1e-7)
    assert not found[4].any()
    other = run(f"embedding{{pooling={mode}}}", tmp_path / "all", hidden, masked=False)
    np.testing.assert_allclose(other, formula(mode, hidden, np.ones_like(MASK)), rtol=2e-6, atol=1e-7)
    assert np.abs(other[1:4] - found[1:4]).max() > 1e-3  # the mask counts


@pytest.mark.parametrize("modes", [("cls", "mean"), ("mean", "cls"), ("weighted-mean", "last", "max")])
def test_poolings_are_joined_in_the_order_that_is_asked_for(modes: tuple[str, ...], tmp_path: Path) -> None:
    found = run(f"embedding{{pooling={'+'.join(modes)}}}", tmp_path, states())
    both = [formula(m, states(), MASK) for m in modes]
    np.testing.assert_allclose(found, np.concatenate(both, axis=1), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_unit_length_at_any_size_and_zeros_for_padding(scale: float, tmp_path: Path) -> None:
    found = run("embedding{pooling=mean normalize=true dim=3}", tmp_path, states(scale))
    expected = formula("mean", states(scale), MASK)[:, :3]
    np.testing.assert_allclose(
        found[:4], (expected / np.linalg.norm(expected, axis=1, keepdims=True).clip(1e-300))[:4], rtol=2e-6
    )
    assert found.shape == (ROWS, 3) and not found[4].any()


def test_a_cut_of_joined_poolings_may_reach_into_the_second(tmp_path: Path) -> None:
    found = run(f"embedding{{pooling=max+mean dim={WIDTH + 4}}}", tmp_path, states())
    both = np.concatenate([formula(m, states(), MASK) for m in ("max", "mean")], axis=1)
    np.testing.assert_allclose(found, both[:, : WIDTH + 4], rtol=2e-6, atol=1e-7)


def test_none_keeps_one_vector_for_each_token(tmp_path: Path) -> None:
    found = run("embedding{pooling=none dim=2}", tmp_path, states())
    np.testing.assert_array_equal(found, states()[:, :, :2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "embedding{pooling=average}",
            "there is no pooling 'average': use mean, max, cls, last, mean-sqrt-len, weighted-mean, several joined by "
            "'+', or none",
        ),
        ("embedding{dim=9}", "dim is 9, but an embedding has 8 features: give 1 to 8"),
        ("embedding{dim=0}", "dim is 0, but an embedding has 8 features: give 1 to 8"),
        (
            "embedding,embedding",
            "the output 'output' is [batch_size,8], not [batch, tokens, features]: it cannot be pooled",
        ),
    ],
)
def test_what_cannot_be_pooled_is_refused(text: str, message: str) -> None:
    with pytest.raises(PassError) as error:
        support.apply(module(), text)
    assert message in str(error.value)


def test_a_budget_of_none_leaves_the_outputs() -> None:
    made = module()
    before = to_text(made)
    run_pipeline(made, Pipeline.parse("embedding{pooling=cls normalize=true}"), budgets={"embedding": 0})
    assert to_text(made) == before


def test_an_input_handed_through_keeps_its_name() -> None:
    made = module()
    made.graph.outputs[0] = made.input("hidden")
    support.apply(made, "embedding{pooling=none}")
    assert [v.name for v in made.graph.inputs] == ["hidden", "attention_mask"]
    assert [v.name for v in made.graph.outputs] == ["output"]
