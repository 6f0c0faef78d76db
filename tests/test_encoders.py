"""Every tiny encoder against transformers in float64, on both sessions: text, vision and audio."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends import find_backend
from backends.options import CompileOptions
from qeff_ir import numerics
from qeff_ir.arrays import Array
from qeff_ir.frontend.forward_source import ForwardOptions, ForwardSource, encoder_alone
from qeff_ir.frontend.inputs import find_inputs
from qeff_ir.frontend.providers.memory import Memory
from qeff_ir.frontend.tasks import CTC, EMBEDDING
from qeff_ir.ir.module import Module
from qeff_ir.passing.manager import run_pipeline
from qeff_ir.passing.pipeline import Pipeline
from qeff_ir.runtime.encoder import Encoder
from qeff_ir.specialize import specialize
from tests import support
from tests.encoders import ENCODERS, build, example

TARGETS = ["onnxruntime", "ai100"]
LENGTH = 16
"""Compiled for more tokens than the texts have, so that padding counts."""


@functools.cache
def lowered(name: str) -> tuple[Module, dict[str, torch.Tensor], dict[str, Any]]:
    """The module, an example, and what transformers makes of it in float64."""
    model = encoder_alone(build(name))
    source = ForwardSource(Memory(model), ForwardOptions(CTC if "CTC" in ENCODERS[name].auto else EMBEDDING))
    inputs = example(name, {i.name: i.shape for i in find_inputs(model)})
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        outputs = exact(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    return source.lower(), inputs, dict(outputs)


def compiled(name: str, target: str, folder: Path, embedding: str = "") -> Encoder:
    module = lowered(name)[0].clone()
    options = CompileOptions(batch_size=2, seq_len=(ENCODERS[name].samples or LENGTH,))
    specialize(module, options)
    pipeline = Pipeline.parse(find_backend(target).pipeline).without("last-logits")
    run_pipeline(module, pipeline.insert_before("fuse-norms", embedding) if embedding else pipeline)
    backend = find_backend(target)
    backend.check(module, options)
    backend.emit(module, folder, options)
    return Encoder(backend.open(folder, threads=1))


def real(values: Array, inputs: dict[str, torch.Tensor]) -> Array:
    """Values of tokens that are no padding; what stands at padding means nothing."""
    mask = inputs.get("attention_mask")
    return values[mask.numpy() > 0] if mask is not None and values.shape[:2] == tuple(mask.shape) else values


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    module, inputs, reference = lowered(name)
    for target in TARGETS:
        outputs = compiled(name, target, tmp_path / target).run(inputs)
        assert list(outputs) == [k for k, v in reference.items() if isinstance(v, torch.Tensor)]
        for key, values in outputs.items():
            error = numerics.error_over_rms(real(values, inputs), real(reference[key].numpy(), inputs))
            assert error <= numerics.bound(max(1, numerics.depth(module, key))), (target, key)


@pytest.mark.parametrize("name", [n for n, e in ENCODERS.items() if e.kind == "text"])
def test_every_declared_shape_is_the_true_one(name: str, tmp_path: Path) -> None:
    """Rows may share what has a batch elsewhere: positions, and what is computed from them."""
    module, inputs, _ = lowered(name)
    module = module.clone()
    specialize(module, CompileOptions(batch_size=2, seq_len=(LENGTH,)))
    run_pipeline(module, Pipeline.parse(find_backend("onnxruntime").pipeline).without("last-logits"))
    sizes = module.specializations[0].symbols
    feeds = {k: np.resize(v.numpy(), (2, LENGTH)) for k, v in inputs.items()}
    declared = support.assert_true_shapes(module, tmp_path, feeds, sizes)
    assert sum({2, LENGTH} & set(shape) != set() for shape in declared) > 5


def test_a_lost_mask_is_caught(tmp_path: Path) -> None:
    """The comparison above tells when padding takes part."""
    module, inputs, reference = lowered("bert")
    blind = compiled("bert", "onnxruntime", tmp_path).run({**inputs, "attention_mask": np.ones((2, 11), np.int64)})
    error = numerics.error_over_rms(
        real(blind["last_hidden_state"], inputs), real(reference["last_hidden_state"].numpy(), inputs)
    )
    assert error > 1000 * numerics.bound(numerics.depth(module, "last_hidden_state"))


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_decoder_embeds_texts_that_are_padded_on_the_left(name: str, tmp_path: Path) -> None:
    """The last token is the last column of the text, also where the session adds padding on the right."""
    module, inputs, _ = lowered(name)
    left = {key: torch.stack([value[0], value[1].roll(4)]) for key, value in inputs.items()}
    assert left["attention_mask"][1].tolist() == [0] * 4 + [1] * 7
    exact = copy.deepcopy(build(name)).double()
    with torch.no_grad():
        hidden = exact(**left).last_hidden_state.numpy()
        alone = exact(input_ids=left["input_ids"][1:, 4:]).last_hidden_state.numpy()[:, -1]
    limit = numerics.bound(numerics.depth(module, "last_hidden_state"))
    for target in TARGETS:
        model = compiled(name, target, tmp_path / target, "embedding{pooling=last}")
        found = model.run(left)["output"]
        assert numerics.error_over_rms(found, hidden[:, -1]) <= limit, target
        for column in (0, -2):
            assert numerics.error_over_rms(found, hidden[:, column]) > 1000 * limit
        if name == "qwen3":  # its positions are relative: padding changes nothing
            assert numerics.error_over_rms(found[1:], alone) <= limit, target
        blind = model.run({**left, "attention_mask": torch.ones_like(left["attention_mask"])})["output"]
        assert numerics.error_over_rms(blind[1:], hidden[1:, -1]) > 1000 * limit
