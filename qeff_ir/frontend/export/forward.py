"""A forward pass without a cache becomes a `Module` without states: any model, any inputs, any outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import reset_model_state

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.capture.forward_attention import captured_forward
from qeff_ir.frontend.capture.own_thread import alone
from qeff_ir.frontend.checkpoint.skeleton import evaluating, fake_weights
from qeff_ir.frontend.checkpoint.weights import Weights
from qeff_ir.frontend.export.forward_step import ForwardStep
from qeff_ir.frontend.export.lower import PREFIX, clean, convert
from qeff_ir.frontend.export.own_code import as_unsupported, attributes_kept
from qeff_ir.frontend.export.padding import Found, find_padding
from qeff_ir.frontend.export.quiet import quiet
from qeff_ir.frontend.inputs import BATCH, LENGTH, InputSpec, positions
from qeff_ir.frontend.private import export_patches
from qeff_ir.ir import operators
from qeff_ir.ir.module import Dim, Module, OutputSizes, Padding, rename_symbols
from qeff_ir.runtime.sizes import evaluate

_BATCH, _TOKENS, _SAMPLES = 2, 7, 2003
"""Sizes of the example run: all differ, and a recording is longer than a stack of convolutions looks."""


def lower_forward(
    model: PreTrainedModel,
    weights: Weights,
    inputs: Sequence[InputSpec],
    *,
    pooling: Callable[..., torch.Tensor] | None = None,
    padding: Found | None = None,
) -> Module:
    """Lower one forward pass.

    Args:
        model: The model; its parameters may be on the meta device. Unchanged on return.
        weights: Where each parameter and persistent buffer is. Outputs that need one that is missing are left out.
        inputs: See `qeff_ir.frontend.inputs.find_inputs`.
        pooling: Applied to the first output and the attention mask (ones where there is none); its result, ``output``,
            is then the only output.
        padding: What padding does to the model; found here when not given.

    Returns:
        A module with these inputs, and with the outputs that the forward pass returns, by name; those of nested outputs
        are joined by dots. A length that the model computes from ``seq_len`` has no symbol. Outputs that padding leaves
        alone are in its `padding`.

    Raises:
        ModelLoadError: The first output needs a weight that the checkpoint does not have.
        UnsupportedModelError: Something in the model cannot be traced.
    """
    padding = find_padding(model, inputs, pooling) if padding is None else padding
    names: list[str] = []
    step = ForwardStep(model, pooling, names)
    with (
        alone(),
        evaluating(step),
        torch.no_grad(),
        captured_forward(model),
        fake_weights(model) as fake,
        quiet(),
        attributes_kept(model),
    ):
        with fake:
            examples = {i.name: _example(i, 1 if padding.one_row else _BATCH) for i in inputs}
        with export_patches(), reset_model_state(model), as_unsupported(model, "cannot be traced"):
            exported = torch.export.export(
                step,
                (),
                kwargs={"inputs": examples},
                dynamic_shapes={"inputs": {i.name: _dynamic(i, one_row=padding.one_row) for i in inputs}},
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = convert(exported, [i.name for i in inputs], names)
    _drop_outputs_without_weights(program.model.graph, weights, model)
    module = Module(clean(program.model, weights, []), type(model).__name__)
    _name_dims(module, inputs, model, padding)
    operators.attach(module.model)
    module.write_facts()
    return module


def _example(spec: InputSpec, rows: int) -> torch.Tensor:
    length = _SAMPLES if spec.dtype.is_floating_point and len(spec.shape) == 2 else _TOKENS
    sizes = {BATCH: rows, LENGTH: length}
    return torch.ones([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=spec.dtype)


def _dynamic(spec: InputSpec, *, one_row: bool) -> dict[int, Any]:
    symbols = {LENGTH} if one_row else {BATCH, LENGTH}
    return {axis: torch.export.Dim.DYNAMIC for axis, d in enumerate(spec.shape) if d in symbols}


def _drop_outputs_without_weights(graph: ir.Graph, weights: Weights, model: PreTrainedModel) -> None:
    """Leave out what the checkpoint has no weights for: a pooler, say, that nobody trained."""
    parameters = {f"{PREFIX}{name}" for name, _ in model.named_parameters()}
    missing = {v for n, v in graph.initializers.items() if n in parameters and n.removeprefix(PREFIX) not in weights}
    if not missing:
        return
    tainted = set(missing)
    for node in graph:
        if any(v in tainted for v in node.inputs if v is not None):
            tainted.update(node.outputs)
    first = graph.outputs[0]
    if first in tainted:
        name = min(str(v.name).removeprefix(PREFIX) for v in missing)
        raise ModelLoadError(
            f"the checkpoint has no tensor '{name}', which {type(model).__name__} needs for its output '{first.name}': "
            "it is incomplete or of another model"
        )
    graph.outputs[:] = [v for v in graph.outputs if v not in tainted]
    for node in reversed(list(graph)):
        if not any(v.is_graph_output() or v.uses() for v in node.outputs):
            graph.remove(node, safe=True)
    for value in missing:
        del graph.initializers[str(value.name)]


def _name_dims(module: Module, inputs: Sequence[InputSpec], model: PreTrainedModel, padding: Found) -> None:
    """Replace the exporter's symbols by ours; a computed size of an output stays unnamed."""
    renames: dict[str, str] = {}
    for spec in inputs:
        shape = module.input(spec.name).shape
        assert shape is not None
        for dim, wanted in zip(shape, spec.shape, strict=True):
            if isinstance(wanted, str) and not (wanted == BATCH and padding.one_row):
                if isinstance(dim, int):
                    raise UnsupportedModelError(
                        f"{type(model).__name__} fixes the size of '{wanted}' in its input '{spec.name}' while it is "
                        "traced"
                    )
                renames[str(dim)] = wanted
    rename_symbols(module.graph, renames)
    if padding.one_row:  # traced as a size, which the axis keeps: no other is compiled for
        for value in module.graph.inputs:
            if value.shape is not None and value.shape.dims[:1] == (1,):
                value.shape = ir.Shape([ir.SymbolicDim(BATCH), *value.shape.dims[1:]])
    text = any(LENGTH in i.shape and not (i.dtype.is_floating_point and len(i.shape) == 2) for i in inputs)
    used = {d for i in inputs for d in i.shape if isinstance(d, str)}
    module.dims = {BATCH: Dim(BATCH)} if BATCH in used else {}
    if LENGTH in used:
        limits = [n for n in (positions(model) if text else None, padding.longest) if n is not None]
        module.dims[LENGTH] = Dim(LENGTH, min(limits, default=None))
    outputs: list[OutputSizes] = []
    for value in module.graph.outputs:
        assert value.shape is not None
        found = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
        if value.name in padding.sound and all(_is_known(size) for size in found):
            outputs.append(OutputSizes(value.name, found))
        value.shape = ir.Shape(
            [d if isinstance(d, int) or d.value in module.dims else ir.SymbolicDim(None) for d in value.shape.dims]
        )
    module.padding = Padding(padding.fill, tuple(outputs), padding.one_row)


def _is_known(size: int | str) -> bool:
    """Whether a size follows from those of the inputs."""
    try:
        return isinstance(size, int) or evaluate(size, {BATCH: _BATCH, LENGTH: _SAMPLES}) >= 0
    except ValueError:
        return False
