"""The encoder of a multimodal model becomes a `Module` without states: pixels in, rows for the language model out.

One module is for inputs of one geometry: all inputs that are no floats (grids, sizes, masks of pixels) are constants,
and what follows from them alone is computed while the encoder is traced (`qeff_ir.frontend.export.partial`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import reset_model_state

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture.following import Following
from qeff_ir.frontend.capture.forward_attention import captured_forward
from qeff_ir.frontend.capture.own_thread import alone
from qeff_ir.frontend.capture.segments import Segments
from qeff_ir.frontend.checkpoint.skeleton import evaluating, fake_weights
from qeff_ir.frontend.checkpoint.weights import Weights
from qeff_ir.frontend.export.features import (
    DEEPSTACK,
    Features,
    encode,
    encoder_of,
    other_fields,
    read_features,
)
from qeff_ir.frontend.export.lower import clean, convert
from qeff_ir.frontend.export.own_code import as_unsupported, attributes_kept
from qeff_ir.frontend.export.partial import PartialEvaluation
from qeff_ir.frontend.export.quiet import quiet
from qeff_ir.frontend.export.spelling import cut_splits, drop_idle_squeezes, give_biases, write_out_bags
from qeff_ir.frontend.private import export_patches
from qeff_ir.garbage import settled
from qeff_ir.ir import operators
from qeff_ir.ir.module import SOURCE_KEY, Module
from qeff_ir.ir.ports import ROWS_OUTPUT

ROWS = {"image": "vision_embeds", "video": "vision_embeds", "audio": "vision_embeds"}
"""What the rows of a modality are called: all as those of pictures (AI 100 contract §1.8)."""

Example = Mapping[str, torch.Tensor]
"""What a processor makes of one picture, by name."""

_UNSHAPED = ("Loop", "Scan", "If", "NonZero", "Compress", "Unique")
"""Operators whose work or result no geometry fixes; those of sequences are told by their names."""


def lower_encoder(model: PreTrainedModel, weights: Weights, example: Example, modality: str = "image") -> Module:
    """Lower the encoder of one modality for inputs like an example.

    Args:
        model: The model; its parameters may be on the meta device. Unchanged on return.
        weights: Where each parameter and persistent buffer is.
        example: What the model's processor makes of one picture of the size to compile for; what the encoder does not
            take is ignored. Floats become inputs, everything else is a constant.
        modality: ``image``, ``video`` or ``audio``.

    Returns:
        A module with the example's floats as inputs, all sizes fixed, and with the outputs ``vision_embeds`` ``[1,
        rows, width]`` and, of a model with rows for the hidden states of layers,
        ``deepstack_features`` ``[layers, 1, rows, width]``.

    Raises:
        UnsupportedModelError: The model has no such encoder, it cannot be traced, or its graph has loops, sequences or
            sizes that depend on what a picture shows.
    """
    encoder_of(model, modality)
    floats = {name: value for name, value in example.items() if value.is_floating_point()}
    forms: list[Features] = []
    step = _Step(model, example, modality, forms)
    with (
        alone(),
        evaluating(model),
        settled(),
        torch.no_grad(),
        captured_forward(model),
        fake_weights(model) as fake,
        quiet(),
        attributes_kept(model),
    ):
        with fake:
            inputs = {name: torch.empty(value.shape, dtype=torch.float32) for name, value in floats.items()}
        what = f"has an {modality} encoder that cannot be traced"
        with export_patches(segments=False), reset_model_state(model), as_unsupported(model, what):
            exported = torch.export.export(
                step,
                (),
                kwargs={"inputs": inputs},
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            drop_idle_squeezes(exported)
            cut_splits(exported)
            write_out_bags(exported)
            give_biases(exported)
            names = [ROWS[modality], *([DEEPSTACK] if forms[-1].layers else [])]
            program = convert(exported, list(inputs), names)
    module = Module(clean(program.model, weights, []), f"{type(model).__name__}{modality.capitalize()}")
    for value in module.graph.initializers.values():
        if value.const_value is not None:  # what was computed while tracing has its sizes
            value.shape = ir.Shape(value.const_value.shape.numpy())
    for value in module.graph.outputs:
        module.declare(value, ROWS_OUTPUT)
    _refuse_unshaped(module.graph, type(model).__name__, modality)
    operators.attach(module.model)
    module.write_facts()
    return module


def find_features(model: PreTrainedModel, example: Example, modality: str = "image") -> Features:
    """The form of what an encoder returns for inputs like an example, found on fake tensors.

    Args:
        model: As for `lower_encoder`.
        example: As for `lower_encoder`.
        modality: As for `lower_encoder`.

    Raises:
        UnsupportedModelError: As for `lower_encoder`.
    """
    forms: list[Features] = []
    step = _Step(model, example, modality, forms)
    floats = {name: value for name, value in example.items() if value.is_floating_point()}
    with (
        alone(),
        evaluating(model),
        torch.no_grad(),
        captured_forward(model),
        fake_weights(model) as fake,
        quiet(),
        attributes_kept(model),
        reset_model_state(model),
        export_patches(segments=False),
        as_unsupported(model, f"has an {modality} encoder that cannot be run"),
        fake,
    ):
        step({name: torch.empty(value.shape, dtype=torch.float32) for name, value in floats.items()})
    return replace(forms[-1], fixed=step.fixed)


def fixed_fields(model: PreTrainedModel, example: Example, modality: str, names: Collection[str]) -> dict[str, Any]:
    """Fields of an encoder's output that follow from weights alone; the rest of what it does is for nothing."""
    with captured_forward(model), PartialEvaluation({}), Segments():
        output = encode(model, modality, example)
    return {name: output[name] for name in names}


class _Step(torch.nn.Module):
    """The encoder as a function of its floats, the function that is traced."""

    def __init__(self, model: PreTrainedModel, example: Example, modality: str, forms: list[Features]) -> None:
        super().__init__()
        self.hf = model
        self.modality = modality
        self._example = lambda: example  # tensors on a module would be taken for its own
        self._note = forms.append
        self.fixed: tuple[str, ...] = ()

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        example = self._example()
        known = PartialEvaluation({inputs[name]: example[name].float() for name in inputs})
        following = Following(inputs.values())
        with known, Segments(), following:
            output = encode(self.hf, self.modality, {**example, **inputs})
            form, rows, layers = read_features(self.hf, output)
            self.fixed = other_fields(output, lambda tensor: tensor not in following)
            self._note(form)
            made = () if not layers else (torch.stack(layers).unsqueeze(1),)
            return (rows.unsqueeze(0), *made)


def _refuse_unshaped(graph: ir.Graph, name: str, modality: str) -> None:
    """Refuse a graph that a device cannot lay out in advance."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type in _UNSHAPED or "Sequence" in node.op_type:
            where = node.metadata_props.get(SOURCE_KEY) or "the model itself"
            raise UnsupportedModelError(
                f"the {modality} encoder of {name} makes a {node.op_type} in {where}: its size or work does not follow "
                "from the size of a picture alone"
            )
