"""Layers that are copies of each other are traced once, and nothing tells from the module that they were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture import states
from qeff_ir.frontend.checkpoint.weights import memory_weights
from qeff_ir.frontend.export import lower
from qeff_ir.frontend.layers import kinds as layers
from qeff_ir.frontend.layers import stamp
from qeff_ir.frontend.versions import CACHE
from qeff_ir.ir.module import SOURCE_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.printer import attribute_text, type_text
from tests.models import MODELS, build
from tests.support import CANONICAL, apply

PAIR = ["sliding_attention", "full_attention"]
# Enough layers for one to repeat, where the usual two are of two kinds.
DEEPER: dict[str, dict[str, Any]] = {
    "gemma2": {"num_hidden_layers": 4},
    "gemma3": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", *["sliding_attention", "full_attention"] * 2],
    },
    "gpt-oss": {"num_hidden_layers": 4, "layer_types": PAIR * 2},
    "gpt-neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "inkling": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": ["sparse"] * 4,
    },
    "deepseek-v3": {"num_hidden_layers": 4},
    "deepseek-v32": {"num_hidden_layers": 4},
    "qwen3-next": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
}
# In one, layers use the keys and values of earlier ones; the other adds what it counts from sizes that only have to be
# equal when it runs. Both are traced in full.
APART = {"gemma3n", "inkling"}


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[layers.Fold | None]:
    """What `lower` found, call by call."""
    found: list[layers.Fold | None] = []
    real: Callable[..., layers.Fold | None] = lower.find_fold

    def spy(*args: Any) -> layers.Fold | None:
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(lower, "find_fold", spy)
    return found


def both(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """What lowering makes of a model, each kind of layer traced once and all layers traced."""
    weights = memory_weights(model)
    return digest(lower.lower(model, weights)), digest(lower.lower(model, weights, whole=True))


def digest(module: Module) -> dict[str, Any]:
    """All that a module is once constants are folded, node for node, whatever its values are called.

    Independent nodes have no order. The arithmetic on sizes, which the exporter shares among layers, belongs to none of
    them, its products and sums may be the other way round, and a size may be read off any input that has it.
    """
    apply(module, CANONICAL)
    known: dict[ir.Value | None, str] = {None: "-"}
    for value in module.graph.inputs:
        known[value] = f"{value.name}: {type_text(value)}"
    for name, value in module.graph.initializers.items():
        assert value.const_value is not None
        data = hashlib.sha256(value.const_value.tobytes()).hexdigest()
        known[value] = f"{value.metadata_props.get(WEIGHT_KEY) and name}: {type_text(value)} {data}"
    nodes: list[str] = []
    for node in module.graph:
        sizes = node.outputs[0].dtype == ir.DataType.INT64 and len(node.outputs[0].shape or ()) < 2
        attributes = sorted(f"{a.name}={attribute_text(a)}" for a in node.attributes.values())
        source = "" if sizes else node.metadata_props[SOURCE_KEY]
        types = [type_text(v) for v in node.outputs]
        inputs = [known[v] for v in node.inputs]
        if sizes and node.op_type in ("Add", "Mul"):
            inputs.sort()
        if node.op_type == "Shape" and node.inputs[0] in module.graph.inputs:
            read, start = node.inputs[0], node.attributes.get_int("start", 0)
            assert read is not None and read.shape is not None
            inputs, attributes = [str(read.shape[start : node.attributes.get_int("end", None)])], []
        facts = (node.domain, node.op_type, attributes, source, types, inputs)
        nodes.append(hashlib.sha256(repr(facts).encode()).hexdigest())
        known |= {v: f"{nodes[-1]} {index}" for index, v in enumerate(node.outputs)}
    return {
        "nodes": sorted(nodes),
        "inputs": [known[v] for v in module.graph.inputs],
        "outputs": [(v.name, known[v]) for v in module.graph.outputs],
        "facts": module.facts(),
        "weights": sorted(n for n, v in module.graph.initializers.items() if WEIGHT_KEY in v.metadata_props),
    }


# One of each kind of layer that is copied; the others, and those that are traced in full anyway, are nightly.
KINDS = {"llama", "gemma3", "gpt-oss", "bart", "qwen3-next"}


CASES = [name if name in KINDS else pytest.param(name, marks=pytest.mark.nightly) for name in sorted(MODELS)]


@pytest.mark.parametrize("name", CASES)
def test_copies_are_what_a_full_trace_makes(name: str, folds: list[layers.Fold | None]) -> None:
    folded, whole = both(build(name, **DEEPER.get(name, {}))[1])
    (fold,) = folds
    if name in APART:
        assert fold is None
    else:
        assert fold is not None and len(fold.traced) < len(fold.kinds)
    assert folded == whole


def test_a_factor_that_depends_on_the_layer_tells_layers_apart(folds: list[layers.Fold | None]) -> None:
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)[1]
    lower.lower(model, memory_weights(model))
    assert folds == [None]


def test_an_option_that_has_a_name_tells_layers_apart(folds: list[layers.Fold | None]) -> None:
    model = build("llama")[1]
    for layer, approximate in zip(model.model.layers, ("none", "tanh"), strict=True):
        layer.mlp.act_fn = torch.nn.GELU(approximate=approximate)
    lower.lower(model, memory_weights(model))
    assert folds == [None]


def test_what_follows_the_layers_may_count_them(folds: list[layers.Fold | None]) -> None:
    """A trace of fewer layers would count fewer."""
    model = build("llama")[1]
    model.model.norm.register_forward_hook(lambda module, args, out: out * len(model.model.layers))
    lower.lower(model, memory_weights(model))
    assert folds == [None]


def test_tables_of_other_numbers_tell_layers_apart(folds: list[layers.Fold | None]) -> None:
    """What is read while tracing (a stored mask, say) is not only the layer's own: it makes the layer what it is."""
    model = build("llama")[1]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_buffer("table", torch.full((1,), float(number)), persistent=False)
        layer.mlp.register_forward_hook(lambda module, args, out: out + module.table)
    lower.lower(model, memory_weights(model))
    assert folds == [None]
    for layer in model.model.layers:
        layer.mlp.table.fill_(2.0)
    lower.lower(model, memory_weights(model))
    assert folds[1] is not None


def test_what_one_layer_makes_the_next_makes_too() -> None:
    """The second of two like layers asks torch for nothing; what it computes with has the right shape all the same."""
    model, seen = build("llama")[1], [set[Any](), set[Any]()]
    for layer, forms in zip(model.model.layers, seen, strict=True):
        for name, module in layer.named_modules():
            module.register_forward_hook(
                lambda _, args, out, name=name, forms=forms: forms.update(
                    (name, tuple(t.shape), t.stride(), t.dtype)
                    for t in (*args, *(out if isinstance(out, tuple) else (out,)))
                    if isinstance(t, FakeTensor) and all(isinstance(n, int) for n in list[Any](t.shape))
                )
            )
    lower.lower(model, memory_weights(model))
    first, second = seen
    assert second == first and len(first) > 12


def test_layers_of_one_structure_that_keep_other_states(folds: list[layers.Fold | None]) -> None:
    """What is expected of a layer from another one is not what it does: its own run tells."""
    model: Any = build("gpt2", n_layer=3)[1]
    model.transformer.h[1].attn.head_dim //= 2
    folded, whole = both(model)
    assert folded == whole
    assert folds[0] is None and folds[1] is not None and folds[1].kinds == (0, 1, 0)
    heads = [state.shape[1] for state in lower.lower(model, memory_weights(model)).states]
    assert heads == [heads[0], heads[0], 2 * heads[0], 2 * heads[0], heads[0], heads[0]]


@pytest.mark.parametrize(
    ("store", "shape"),
    [
        (lambda held: held.append(("key", 0), torch.zeros(2, 3, 5, 4)), (2, 4, 11, 4)),
        (lambda held: held.append(("key", 0), torch.zeros(2, 3, 5, 4)), (2, 3, 11, 8)),
        (lambda held: held.slide(("conv", 0), torch.zeros(2, 3, 5), 4), (2, 3, 3)),
        (lambda held: held.slide(("conv", 0), torch.zeros(2, 3, 5), 4), (2, 6, 4)),
        (lambda held: held.replace(("recurrent", 0), torch.zeros(2, 3, 4)), (2, 3, 8)),
        (lambda held: held.replace(("recurrent", 0), torch.zeros(2, 3, 4)), (2, 3, 4, 1)),
    ],
)
def test_a_state_of_another_shape_than_expected_is_refused(
    store: Callable[[states._Held], torch.Tensor], shape: tuple[int, ...]
) -> None:
    keys: list[states.Key] = [("key", 0), ("conv", 0), ("recurrent", 0)]
    held = states._Held(torch.zeros(2, 5, dtype=torch.long), dict.fromkeys(keys, torch.zeros(shape)), len(keys))
    with pytest.raises(UnsupportedModelError, match="of one shape in one run and of another in the next"):
        store(held)


def test_a_state_that_only_one_of_several_like_layers_keeps(folds: list[layers.Fold | None]) -> None:
    """It shows in no operation; it is a state all the same."""

    def remember(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], out: torch.Tensor) -> None:
        kwargs[CACHE].layers[1].held.replace(("recurrent", 0), out)

    model = build("llama", num_hidden_layers=3)[1]
    model.model.layers[1].register_forward_hook(remember, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match=r"recurrent|traced"):
        lower.lower(model, memory_weights(model))
    assert folds[0] is None


def test_a_model_may_ask_what_an_empty_cache_holds(folds: list[layers.Fold | None]) -> None:
    asked: list[int] = []

    def ask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        asked.append(kwargs[CACHE].layers[0].values.numel())

    model = build("llama")[1]
    model.model.layers[0].register_forward_pre_hook(ask, with_kwargs=True)
    lower.lower(model, memory_weights(model))
    assert asked[0] == 0 and folds[0] is not None


def test_what_crosses_between_layers_is_traced_in_full(folds: list[layers.Fold | None]) -> None:
    model = build("llama")[1]
    first, second = model.model.layers
    first.mlp.register_forward_hook(lambda module, args, out: setattr(module, "seen", out))
    second.mlp.register_forward_hook(lambda module, args, out: out + first.mlp.seen)
    module = lower.lower(model, memory_weights(model))
    assert folds == [None]
    assert [s.layer for s in module.states] == [0, 0, 1, 1]


def test_layers_between_which_something_happens_are_traced_in_full(folds: list[layers.Fold | None]) -> None:
    class Doubled(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return 2 * self.layer(hidden, **kwargs)

    model = build("llama")[1]
    model.model.layers[1] = Doubled(model.model.layers[1])  # a layer of another class: another kind
    lower.lower(model, memory_weights(model))
    assert folds == [None]


def test_the_comparison_sees_a_wrong_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stamp._Copier._renamed

    def swapped(self: stamp._Copier, name: str) -> str:
        first, second = "q_proj.weight", "o_proj.weight"
        right = real(self, name)
        return right.replace(first, second) if first in right else right.replace(second, first)

    monkeypatch.setattr(stamp._Copier, "_renamed", swapped)
    folded, whole = both(build("llama")[1])
    assert folded["outputs"] != whole["outputs"]
    assert {k: v for k, v in folded.items() if k not in ("nodes", "outputs")} == {
        k: v for k, v in whole.items() if k not in ("nodes", "outputs")
    }
