"""A transformers causal LM becomes a `Module`: find its states, trace it on fake tensors, convert, refer to weights.

`torch.export` traces the model inside `captured`; `torch.onnx` converts the graph with transformers' own export fixes;
the initializers then become references to the checkpoint.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnxscript import version_converter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import reset_model_state
from transformers.exporters.exporter_onnx import apply_onnx_ir_fixes
from transformers.exporters.utils import apply_fx_node_fixes
from transformers.pytorch_utils import Conv1D

from qeff_ir.errors import ModelLoadError, UnsupportedModelError
from qeff_ir.frontend.capture import ops
from qeff_ir.frontend.capture.attention import captured, tracing
from qeff_ir.frontend.capture.own_masks import refuse_own_masks
from qeff_ir.frontend.capture.own_thread import alone
from qeff_ir.frontend.capture.states import CapturingCache
from qeff_ir.frontend.checkpoint.skeleton import evaluating, fake_weights
from qeff_ir.frontend.checkpoint.weights import Weights
from qeff_ir.frontend.export.given import Given
from qeff_ir.frontend.export.limits import plain_rotary
from qeff_ir.frontend.export.own_code import as_unsupported, attributes_kept
from qeff_ir.frontend.export.positions import give_positions
from qeff_ir.frontend.export.quiet import quiet
from qeff_ir.frontend.export.spelling import drop_idle_squeezes, spell_out_complex
from qeff_ir.frontend.layers.kinds import Fold, Prepared, cut, find_fold, marked
from qeff_ir.frontend.layers.probing import expect, probe
from qeff_ir.frontend.layers.stamp import cut_weights, find_layers, unfold
from qeff_ir.frontend.private import export_patches, onnx_translations
from qeff_ir.frontend.versions import cache_argument
from qeff_ir.garbage import settled
from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import LAYER_KEY, SOURCE_KEY, WEIGHT_KEY, Dim, Module, all_values, rename_symbols
from qeff_ir.ir.ports import LOGITS, POSITIONS, TOKENS, name_of
from qeff_ir.ir.residents import DimValue, Resident

# Sizes of the example run. All differ, and none is 0 or 1, which torch.export would take for constants.
_BATCH, _SEQ, _CTX, _SLIDING = 2, 5, 11, 13
_TORCH_OPSET = 18
_IR_VERSION = 11
"""Opset 24 needs IR version 11 or later."""
PREFIX = "hf."
"""Scope of the model inside `Step`; taken off every name."""


def lower(model: PreTrainedModel, weights: Weights, *, whole: bool = False, given: Given | None = None) -> Module:
    """Lower a causal LM with retained states.

    Layers that are shown to be copies of each other are traced once (`qeff_ir.frontend.layers.kinds`).

    Args:
        model: The model; its parameters may be on the meta device. Unchanged on return.
        weights: Where each parameter and persistent buffer is.
        whole: Whether to trace every layer all the same.
        given: What it is given beside tokens; nothing by default.

    Returns:
        A module with inputs ``input_ids``, ``position_ids`` (int64 ``[batch_size, seq_len]``), the states and what is
        given, and outputs ``logits`` (float32 ``[batch_size, seq_len, vocab]``), the new states and what is given back.

    Raises:
        UnsupportedModelError: The model has no cache, its attention is not causal or builds its own masks, or something
            in it cannot be traced.
    """
    given = Given() if given is None else given
    with (
        alone(),
        evaluating(model),
        settled(),
        torch.no_grad(),
        captured(model),
        fake_weights(model) as fake,
        quiet(),
        plain_rotary(model) as original,
    ):
        states, fold = _states_and_fold(model, given, fake, whole=whole)
        module = None if fold is None else _folded(model, weights, states, given, fold, fake)
        if module is None:
            with attributes_kept(model):
                module = _module(_trace(model, states, given, fake), model, weights, states, given)
    if original is not None:
        known = module.dims["ctx_len"].maximum
        module.dims["ctx_len"] = Dim("ctx_len", original if known is None else min(known, original))
    operators.attach(module.model)
    module.write_facts()
    return module


def _folded(
    model: PreTrainedModel, weights: Weights, states: list[Resident], given: Given, fold: Fold, fake: FakeTensorMode
) -> Module | None:
    """The module made from one layer of each kind; `None` when the cut graph is not a chain of layers."""
    kept = [s for s in states if s.layer in fold.states]
    buffers = [(n, b) for n, b in model.named_buffers() if not isinstance(b, FakeTensor)]
    tensors = {**{n: tensor_adapters.TorchTensor(b, name=n) for n, b in buffers}, **weights}
    try:
        with attributes_kept(model), cut(model, fold.path, fold.traced), marked(model, fold.path):
            module = _module(_trace(model, kept, given, fake), model, cut_weights(weights, fold), kept, given)
    except UnsupportedModelError:  # what the whole model does tells, and what it says is about itself
        return None
    layers = find_layers(module, fold, tensors)
    if layers is None:
        return None
    unfold(module, fold, layers, tensors)
    return module


def _module(
    traced: tuple[torch.onnx.ONNXProgram, int | None],
    model: PreTrainedModel,
    weights: Weights,
    states: list[Resident],
    given: Given,
) -> Module:
    program, limit = traced
    graph_model = clean(program.model, weights, states)
    _mark_layers(graph_model.graph, model)
    refuse_own_masks(graph_model.graph, type(model).__name__)
    module = Module(graph_model, type(model).__name__, states)
    for port in (*given.inputs, *given.outputs):
        module.ports[port.name] = port.role.name
    _name_dims(module, model, given, limit)
    return module


class Step(torch.nn.Module):
    """One run of a decoder with explicit states, the function that is traced."""

    def __init__(self, model: PreTrainedModel, states: list[Resident], given: Given) -> None:
        super().__init__()
        self.hf = model
        self.states = states
        self.given = given
        parameters = inspect.signature(model.forward).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        by_name = given.positions in parameters
        self.takes_positions = by_name or (anything and given.positions == Given.positions)
        self.cache_argument = cache_argument(model.forward)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
        counted: torch.Tensor,
        given: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = CapturingCache(self.hf, position_ids, dict(zip(self.states, past, strict=True)), count=counted.shape[0])
        out, results = self.run(input_ids, position_ids, cache, given)
        for state in cache.found():
            raise UnsupportedModelError(f"layer {state.layer} keeps a {state.kind} state in one run and not in another")
        return (out.logits, *(cache.result(state) for state in self.states), *results)

    def run(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: CapturingCache,
        given: dict[str, torch.Tensor],
    ) -> tuple[Any, list[torch.Tensor]]:
        """The model's own outputs, and what is given back."""
        arguments: dict[str, Any] = {self.cache_argument: cache, "use_cache": True}
        if self.takes_positions:
            arguments[self.given.positions] = position_ids
        with tracing(cache), self.given.calling(self.hf, given, cache) as call:
            out = self.hf(**{self.given.tokens: input_ids, **arguments, **call.arguments})
        return out, call.results


def _states_and_fold(
    model: PreTrainedModel, given: Given, fake: FakeTensorMode, *, whole: bool
) -> tuple[list[Resident], Fold | None]:
    """What the model keeps between tokens, and which of its layers are to be traced (`None`: all of them)."""
    step = Step(model, [], given)
    with fake:
        ids, values = example_inputs(given)

    def run(cache: CapturingCache) -> None:
        with fake:
            step.run(ids, cache.position_ids, cache, values)

    def fold(states: list[Resident]) -> Fold | None:
        with attributes_kept(model):
            return find_fold(model, lambda kept: _prepared(model, states, given, kept, fake))

    expected: list[Resident] | None = None
    if not whole:
        with attributes_kept(model):
            expected = expect(model, run, ids)
        if expected and (found := fold(expected)) is not None:
            return expected, found
    with attributes_kept(model), as_unsupported(model, "cannot be run with a cache"):
        states = probe(model, run, ids)
    if not states:
        raise UnsupportedModelError(
            f"{type(model).__name__} writes to no cache, so there is no state to retain between tokens"
        )
    return states, None if whole or states == expected else fold(states)


def _inputs(
    states: list[Resident], given: Given, fake: FakeTensorMode
) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
    """Token ids (or positions), states, and what is given beside them, for a run on fake tensors."""
    with fake:
        ids, values = example_inputs(given)
        past = [torch.zeros([_example(state, dim) for dim in state.shape]) for state in states]
    return ids, past, values


def example_inputs(given: Given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token ids (or positions), and what is given beside them, in the fake mode that is active."""
    sizes = {"batch_size": _BATCH, "seq_len": _SEQ}
    values = {
        port.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in port.shape], dtype=port.dtype)
        for port in given.inputs
    }
    return torch.zeros((_BATCH, _SEQ), dtype=torch.long), values


def _prepared(
    model: PreTrainedModel, states: list[Resident], given: Given, kept: frozenset[int] | None, fake: FakeTensorMode
) -> Prepared:
    """A run of the model with the states of some layers only, for `find_fold`."""
    states = [s for s in states if kept is None or s.layer in kept]
    ids, past, values = _inputs(states, given, fake)
    with fake:
        positions = ids.clone()
    held = dict(zip(states, past, strict=True))
    inputs = {name_of(TOKENS): ids, name_of(POSITIONS): positions, **values, **held}

    def work() -> Sequence[torch.Tensor]:
        with export_patches(), reset_model_state(model), fake:
            results = Step(model, states, given)(ids, positions, past, torch.zeros(_CTX - _SEQ), values)
            return results[: 1 + len(states)]

    return inputs, work


def _trace(
    model: PreTrainedModel, states: list[Resident], given: Given, fake: FakeTensorMode
) -> tuple[torch.onnx.ONNXProgram, int | None]:
    """The program, and the longest context that it holds for."""
    ids, past, values = _inputs(states, given, fake)
    with fake:
        counted = torch.zeros(_CTX - _SEQ)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        "input_ids": {0: dynamic, 1: dynamic},
        "position_ids": {0: dynamic, 1: dynamic},
        "past": [{i: dynamic for i, dim in enumerate(state.shape) if isinstance(dim, str)} for state in states],
        "counted": {0: dynamic},
        "given": {
            port.name: {i: dynamic for i, dim in enumerate(port.shape) if isinstance(dim, str)} for port in given.inputs
        },
    }
    with export_patches(), reset_model_state(model), as_unsupported(model, "cannot be traced"):
        exported = torch.export.export(
            Step(model, states, given),
            (),
            kwargs={
                "input_ids": ids,
                "position_ids": ids.clone(),
                "past": past,
                "counted": counted,
                "given": values,
            },
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        spell_out_complex(exported)
        drop_idle_squeezes(exported)
        beside = [f"given_{port.name}" for port in given.inputs]
        _, limit = give_positions(exported, "input_ids", "position_ids", "counted", type(model).__name__, beside)
        program = convert(
            exported,
            [name_of(TOKENS), name_of(POSITIONS), *(s.input for s in states), "counted", *values],
            [name_of(LOGITS), *(s.output for s in states), *(port.name for port in given.outputs)],
        )
    inputs = program.model.graph.inputs
    inputs[:] = [value for value in inputs if value.name != "counted"]  # what counted is not read any more
    return program, limit


def convert(
    exported: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> torch.onnx.ONNXProgram:
    """Convert a traced program to ONNX under transformers' export patches, with these names at its edge."""
    apply_fx_node_fixes("onnx", exported.graph_module)
    program = torch.onnx.export(
        exported,
        custom_translation_table={**onnx_translations(), **ops.TRANSLATIONS},
        opset_version=_TORCH_OPSET,
        optimize=False,
        verbose=False,
        input_names=inputs,
        output_names=outputs,
    )
    assert program is not None
    apply_onnx_ir_fixes(program)
    return program


def _example(state: Resident, dim: DimValue) -> int:
    if isinstance(dim, int):
        return dim
    return _BATCH if dim == "batch_size" else _CTX if state.window is None else _SLIDING


def clean(model: ir.Model, weights: Weights, states: list[Resident]) -> ir.Model:
    """Give standard names, one opset, short metadata, and references for weights to what the exporter made."""
    graph = model.graph
    for node in ir.traversal.RecursiveGraphIterator(graph):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        # The last scope is the node itself, the one before it the module that ran it.
        source = scopes[-2].removeprefix(PREFIX.rstrip(".")).removeprefix(".") if len(scopes) > 1 else ""
        node.metadata_props.clear()
        node.metadata_props[SOURCE_KEY] = source
        node.doc_string = None
    for value in all_values(graph):
        value.metadata_props.clear()
        value.doc_string = None
    _refer_to_weights(graph, weights)
    version_converter.convert_version(model, dialect.OPSET)
    for node in graph:
        if node.domain == dialect.DOMAIN and node.op_type in ops.STANDARD:
            node.domain = ""
    model.opset_imports.clear()
    model.opset_imports.update({"": dialect.OPSET, dialect.DOMAIN: dialect.VERSION})
    model.producer_name, model.producer_version = "qeff-ir", None
    model.ir_version = _IR_VERSION
    model.metadata_props.clear()
    graph.doc_string = None
    return model


def _refer_to_weights(graph: ir.Graph, weights: Weights) -> None:
    for name, value in list(graph.initializers.items()):
        if not name.startswith(PREFIX):
            continue
        plain = name.removeprefix(PREFIX)
        del graph.initializers[name]
        value.name = plain
        if plain in weights:
            value.const_value = weights[plain]
            value.dtype = weights[plain].dtype
            value.metadata_props[WEIGHT_KEY] = plain
        elif isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            raise ModelLoadError(f"the checkpoint has no tensor for '{plain}', which the traced model uses")
        graph.register_initializer(value)


def _mark_layers(graph: ir.Graph, model: PreTrainedModel) -> None:
    """Note on each matrix what it is to the module that owns it, see `LAYER_KEY`."""
    for value in graph.initializers.values():
        owner, _, own = value.metadata_props.get(WEIGHT_KEY, "").rpartition(".")
        if own == "weight":
            module = model.get_submodule(owner)
            if isinstance(module, torch.nn.Linear | Conv1D):
                value.metadata_props[LAYER_KEY] = "linear"
            elif isinstance(module, torch.nn.Embedding):
                value.metadata_props[LAYER_KEY] = "embedding"
            elif value.shape is not None and len(value.shape) == 2:
                value.metadata_props[LAYER_KEY] = "parameter"


def _name_dims(module: Module, model: PreTrainedModel, given: Given, limit: int | None) -> None:
    """Replace the exporter's symbols by ours, on the inputs and everywhere else; `limit` is the longest context."""
    renames: dict[str, str] = {}
    for role in (TOKENS, POSITIONS):
        shape = module.port(role).shape
        assert shape is not None
        renames |= {str(shape[0]): "batch_size", str(shape[1]): "seq_len"}
    for state in module.states:
        shape = module.input(state.input).shape
        assert shape is not None
        renames |= {str(made): name for made, name in zip(shape, state.shape, strict=True) if isinstance(name, str)}
    for port in given.inputs:
        shape = module.input(port.name).shape
        assert shape is not None
        renames |= {str(made): name for made, name in zip(shape, port.shape, strict=True) if isinstance(name, str)}
    rename_symbols(module.graph, renames)
    for port in given.outputs:
        module.output(port.name).shape = ir.Shape(port.shape)
    config = model.config.get_text_config(decoder=True)
    longest = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    limits = [n for n in (*longest, limit) if isinstance(n, int)]
    module.dims = {
        "batch_size": Dim("batch_size"),
        "seq_len": Dim("seq_len"),
        "ctx_len": Dim("ctx_len", min(limits, default=None)),
    }
