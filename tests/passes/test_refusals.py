"""What a pass cannot do right it refuses, instead of doing something else in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qeff_ir.adapters.folder import WEIGHTS_FILE
from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from tests import support
from tests.adapters.random_adapters import base, make
from tests.passes.bends.editing import like, nodes, replace_logits

NAME = "llama"
LORA = "lora{targets=q_proj}"


def heads_of_unknown_number(module: Module) -> None:
    queries = nodes(module, "Attention")[0].inputs[0]
    assert queries is not None
    queries.shape = None


def nothing_specialized(module: Module) -> None:
    module.specializations = []


def unknown_operator(module: Module) -> None:
    """An operator of opset 20, for which there is no lowering."""
    replace_logits(module, lambda b, old: like(old, b, "StringSplit"))


def projection_without_shape(module: Module) -> None:
    weight = module.graph.initializers["model.layers.0.self_attn.q_proj.weight"]
    (reader,) = weight.consumers()
    if reader.op_type == "Transpose":
        (reader,) = reader.outputs[0].consumers()
    reader.outputs[0].shape = None


@dataclass(frozen=True)
class Refusal:
    """A pass that refuses, what was done before, and what it says."""

    before: str
    step: str
    says: str
    change: Callable[[Module], None] | None = None


REFUSALS = {
    "heads of unknown number": Refusal(
        "kv-retention", "attention", "heads of unknown number or width", heads_of_unknown_number
    ),
    "nothing specialized": Refusal("", "kv-retention", "set the module's specializations", nothing_specialized),
    "last logits twice": Refusal("last-logits", "last-logits", "last-logits has run before"),
    "operator without lowering": Refusal(
        "kv-retention,attention", "legalize", "StringSplit .* does not exist in opset 18, and has no", unknown_operator
    ),
    "no slots": Refusal("", "lora{targets=q_proj n=0}", "n=0 and rank=.* at least 1"),
    "no rank": Refusal("", "lora{targets=q_proj rank=0}", "rank=0 must be at least 1"),
    "adapters twice": Refusal(LORA, LORA, "adapter inputs already"),
    "adapters of both modes": Refusal(LORA, "lora{mode=single rank=2 targets=q_proj}", "adapter inputs already"),
    "layers in words": Refusal("", "lora{targets=q_proj layers=first}", "layers=first is no list of numbers"),
    "projection without shape": Refusal("", LORA, "has no shape", projection_without_shape),
    "no adapter": Refusal("", "merge-lora", "no adapter is named"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_pass_refuses(refusal: Refusal) -> None:
    module = support.canonical(NAME)
    if refusal.before:
        support.apply(module, refusal.before)
    if refusal.change is not None:
        refusal.change(module)
    with pytest.raises(PassError, match=refusal.says):
        support.apply(module, refusal.step)


def another_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("layers.1.", "layers.7."): tensor for key, tensor in tensors.items()}


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors of a model with more features."""
    return {key: torch.cat([tensor] * 2, dim=1 if "lora_A" in key else 0) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [(another_layer, r"changes model\.layers\.7\..*which the model does not have"), (wider, "of another base model")],
    ids=["another layer", "wider"],
)
def test_an_adapter_of_another_model_is_not_merged(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], says: str, tmp_path: Path
) -> None:
    """Not even in the layers that fit."""
    make(base(NAME), tmp_path, 0, r=2, target_modules=["q_proj"])
    support.apply(support.canonical(NAME), f'merge-lora{{adapter="{tmp_path}"}}')
    save_file(change(load_file(tmp_path / WEIGHTS_FILE)), tmp_path / WEIGHTS_FILE)
    with pytest.raises(PassError, match=says):
        support.apply(support.canonical(NAME), f'merge-lora{{adapter="{tmp_path}"}}')


def test_a_bias_is_not_merged_where_there_is_none(tmp_path: Path) -> None:
    make(base(NAME), tmp_path, 0, r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(PassError, match="q_proj, which has none to merge it into"):
        support.apply(support.canonical(NAME), f'merge-lora{{adapter="{tmp_path}"}}')
