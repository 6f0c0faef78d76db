"""A transformers causal LM becomes a `Module`: probe the layers, trace once on fake tensors, convert, refer to weights.

`torch.export` traces the model inside `captured`; `torch.onnx` converts the graph with transformers' own export fixes;
the initializers then become references to the checkpoint.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnxscript import values, version_converter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import reset_model_state
from transformers.exporters.exporter_onnx import apply_onnx_ir_fixes
from transformers.exporters.utils import apply_fx_node_fixes, apply_patches

from qeff_ir import dialect
from qeff_ir.errors import ModelLoadError, QeffError, UnsupportedModelError
from qeff_ir.frontend.capture import CapturingCache, LayerSpec, captured, tracing
from qeff_ir.frontend.layers import INPUT, OUTPUT, Fold, Prepared, cut, find_fold, marked
from qeff_ir.frontend.own_masks import refuse_own_masks
from qeff_ir.frontend.private import onnx_translations
from qeff_ir.frontend.skeleton import fake_weights
from qeff_ir.frontend.stamp import cut_weights, find_layers, unfold
from qeff_ir.frontend.weights import Weights
from qeff_ir.module import SOURCE_KEY, WEIGHT_KEY, Dim, Module, Role, State, all_values, rename_symbols

# Sizes of the example run. All differ, and none is 0 or 1, which torch.export would take for constants.
_BATCH, _SEQ, _CTX, _SLIDING = 2, 5, 11, 13
_TORCH_OPSET = 18
_IR_VERSION = 11
"""Opset 24 needs IR version 11 or later."""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
"""Color codes of a terminal."""
_PREFIX = "hf."
"""Scope of the model inside `_Step`; taken off every name."""


def lower(model: PreTrainedModel, weights: Weights, *, whole: bool = False) -> Module:
    """Lower a causal LM with retained key/value states.

    Layers that are shown to be copies of each other are traced once (`qeff_ir.frontend.layers`).

    Args:
        model: The model; its parameters may be on the meta device. Unchanged on return.
        weights: Where each parameter and persistent buffer is.
        whole: Whether to trace every layer all the same.

    Returns:
        A module with inputs ``input_ids``, ``position_ids`` (int64 ``[batch_size, seq_len]``) and the states, and
        outputs ``logits`` (float32 ``[batch_size, seq_len, vocab]``) and the new states.

    Raises:
        UnsupportedModelError: The model has no key/value cache, its attention is not causal or builds its own masks, or
            something in it cannot be traced.
    """
    model = model.eval()
    with torch.no_grad(), captured(model), fake_weights(model) as fake, _quiet():
        with _attributes_kept(model):
            specs = _probe(model, fake)
        with _attributes_kept(model):
            fold = None if whole else find_fold(model, lambda kept: _prepared(model, specs, kept, fake))
        folded = None if fold is None else _folded(model, weights, specs, fold, fake)
        if folded is not None:
            return folded
        with _attributes_kept(model):
            program = _trace(model, specs, fake)
    return _finished(_module(program, model, weights, specs))


def _folded(
    model: PreTrainedModel, weights: Weights, specs: list[LayerSpec], fold: Fold, fake: FakeTensorMode
) -> Module | None:
    """The module made from one layer of each kind; `None` when the cut graph is not a chain of layers."""
    kept = [s for s in specs if s.layer in fold.states]
    buffers = [(n, b) for n, b in model.named_buffers() if not isinstance(b, FakeTensor)]
    tensors = {**{n: tensor_adapters.TorchTensor(b, name=n) for n, b in buffers}, **weights}
    with _attributes_kept(model), cut(model, fold.path, fold.traced), marked(model, fold.path):
        program = _trace(model, kept, fake)
        module = _module(program, model, cut_weights(weights, fold), kept)
    layers = find_layers(module, fold, tensors)
    if layers is None:
        return None
    unfold(module, fold, layers, tensors)
    return _finished(module)


def _module(
    program: torch.onnx.ONNXProgram, model: PreTrainedModel, weights: Weights, specs: list[LayerSpec]
) -> Module:
    states = _states(specs)
    graph_model = _clean(program.model, weights, states)
    refuse_own_masks(graph_model.graph, type(model).__name__)
    module = Module(graph_model, type(model).__name__, states)
    _name_dims(module, model)
    return module


def _finished(module: Module) -> Module:
    dialect.attach(module.model)
    module.write_facts()
    return module


class _Step(torch.nn.Module):
    """One run of a decoder with explicit states, the function that is traced."""

    def __init__(self, model: PreTrainedModel, specs: list[LayerSpec]) -> None:
        super().__init__()
        self.hf = model
        self.specs = specs
        parameters = inspect.signature(model.forward).parameters
        kinds = {p.kind for p in parameters.values()}
        self.takes_positions = "position_ids" in parameters or inspect.Parameter.VAR_KEYWORD in kinds

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        cache = CapturingCache(self.hf, position_ids, self.specs, past)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        with tracing(cache):
            out = self.hf(input_ids=input_ids, past_key_values=cache, use_cache=True, **positions)
        return (out.logits, *cache.results())


def _probe(model: PreTrainedModel, fake: FakeTensorMode) -> list[LayerSpec]:
    """Run the model once on fake tensors to see what each layer caches."""
    step = _Step(model, [])
    with fake:
        ids = torch.zeros((_BATCH, _SEQ), dtype=torch.long)
        cache = CapturingCache(model, ids, [], [])
        positions = {"position_ids": ids} if step.takes_positions else {}
        with tracing(cache), _as_unsupported(model, "cannot be run with a key/value cache"):
            model(input_ids=ids, past_key_values=cache, use_cache=True, **positions)
    specs = cache.specs()
    if not specs:
        raise UnsupportedModelError(
            f"{type(model).__name__} writes to no key/value cache, so there is no state to retain between tokens"
        )
    return specs


def _inputs(specs: list[LayerSpec], fake: FakeTensorMode) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Token ids (or positions), and states, for a run on fake tensors."""
    with fake:
        ids = torch.zeros((_BATCH, _SEQ), dtype=torch.long)
        past = [
            torch.zeros((_BATCH, heads, _CTX if s.window is None else _SLIDING, width))
            for s in specs
            for heads, width in (s.key, s.value)
        ]
    return ids, past


def _prepared(
    model: PreTrainedModel, specs: list[LayerSpec], kept: frozenset[int] | None, fake: FakeTensorMode
) -> Prepared:
    """A run of the model with the states of some layers only, for `find_fold`."""
    specs = [s for s in specs if kept is None or s.layer in kept]
    ids, past = _inputs(specs, fake)
    with fake:
        positions = ids.clone()
    names = ["input_ids", "position_ids", *(s.input for s in _states(specs))]

    def work() -> Sequence[torch.Tensor]:
        with apply_patches("onnx"), apply_patches("dynamo"), reset_model_state(model), fake:
            return _Step(model, specs)(ids, positions, past)

    return dict(zip(names, [ids, positions, *past], strict=True)), work


def _trace(model: PreTrainedModel, specs: list[LayerSpec], fake: FakeTensorMode) -> torch.onnx.ONNXProgram:
    ids, past = _inputs(specs, fake)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        "input_ids": {0: dynamic, 1: dynamic},
        "position_ids": {0: dynamic, 1: dynamic},
        "past": [{0: dynamic, 2: dynamic} for _ in past],
    }
    states = _states(specs)
    with (
        apply_patches("onnx"),
        apply_patches("dynamo"),
        reset_model_state(model),
        _as_unsupported(model, "cannot be traced"),
    ):
        exported = torch.export.export(
            _Step(model, specs),
            (),
            kwargs={"input_ids": ids, "position_ids": ids.clone(), "past": past},
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        apply_fx_node_fixes("onnx", exported.graph_module)
        program = torch.onnx.export(
            exported,
            custom_translation_table={**onnx_translations(), **_TRANSLATIONS},
            opset_version=_TORCH_OPSET,
            optimize=False,
            verbose=False,
            input_names=["input_ids", "position_ids", *(s.input for s in states)],
            output_names=["logits", *(s.output for s in states)],
        )
        assert program is not None
        apply_onnx_ir_fixes(program)
    return program


def _states(specs: list[LayerSpec]) -> list[State]:
    def state(spec: LayerSpec, role: Role, heads: int, width: int) -> State:
        return State(spec.layer, role, ("batch_size", heads, "ctx_len", width), ir.DataType.FLOAT, spec.window)

    return [made for s in specs for made in (state(s, "key", *s.key), state(s, "value", *s.value))]


# The exporter works at an older opset, so it only sees opaque ops of the dialect's domain; `_clean` gives them bodies,
# or their standard name where ONNX has one.
_STANDARD = {"Attention"}


def _opaque(name: str, *attributes: str) -> Callable[..., Any]:
    op = values.Op(values.Opset(dialect.DOMAIN, dialect.VERSION), name)

    def translate(*args: Any) -> Any:
        count = len(args) - len(attributes)
        return op(*args[:count], **dict(zip(attributes, args[count:], strict=True)))

    return translate


_TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.qeff.cache_update.default: _opaque("CacheUpdate"),
    torch.ops.qeff.cache_positions.default: _opaque("CachePositions"),
    torch.ops.qeff.layer_input.default: _opaque(INPUT),
    torch.ops.qeff.layer_output.default: _opaque(OUTPUT),
    torch.ops.qeff.attention.default: _opaque("Attention", "scale", "softcap"),
    torch.ops.qeff.sink_attention.default: _opaque("SinkAttention", "scale", "softcap"),
}


def _clean(model: ir.Model, weights: Weights, states: list[State]) -> ir.Model:
    """Give standard names, one opset, short metadata, and references for weights to what the exporter made."""
    graph = model.graph
    for node in ir.traversal.RecursiveGraphIterator(graph):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        # The last scope is the node itself, the one before it the module that ran it.
        source = scopes[-2].removeprefix(_PREFIX.rstrip(".")).removeprefix(".") if len(scopes) > 1 else ""
        node.metadata_props.clear()
        node.metadata_props[SOURCE_KEY] = source
        node.doc_string = None
    for value in all_values(graph):
        value.metadata_props.clear()
        value.doc_string = None
    _refer_to_weights(graph, weights)
    version_converter.convert_version(model, dialect.OPSET)
    for node in graph:
        if node.domain == dialect.DOMAIN and node.op_type in _STANDARD:
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
        if not name.startswith(_PREFIX):
            continue
        plain = name.removeprefix(_PREFIX)
        del graph.initializers[name]
        value.name = plain
        if plain in weights:
            value.const_value = weights[plain]
            value.dtype = weights[plain].dtype
            value.metadata_props[WEIGHT_KEY] = plain
        elif isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            raise ModelLoadError(f"the checkpoint has no tensor for '{plain}', which the traced model uses")
        graph.register_initializer(value)


def _name_dims(module: Module, model: PreTrainedModel) -> None:
    """Replace the exporter's symbols by ours, on the inputs and everywhere else."""
    ids = module.input("input_ids").shape
    assert ids is not None
    renames = {str(ids[0]): "batch_size", str(ids[1]): "seq_len"}
    for state in module.states:
        shape = module.input(state.input).shape
        assert shape is not None
        renames |= {str(shape[0]): "batch_size", str(shape[2]): "ctx_len"}
    rename_symbols(module.graph, renames)
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    positions = module.input("position_ids")
    if any(node.op_type == "ReduceMax" and node.inputs[0] is positions for node in module.graph):
        # A run's longest position switches its rotary frequencies: beyond the original length, an answer would depend
        # on how its prompt is cut into chunks, and on the other rows.
        longest = (config.rope_parameters or {}).get("original_max_position_embeddings", longest)
    module.dims = {
        "batch_size": Dim("batch_size"),
        "seq_len": Dim("seq_len"),
        "ctx_len": Dim("ctx_len", longest if isinstance(longest, int) else None),
    }


@contextlib.contextmanager
def _attributes_kept(model: PreTrainedModel) -> Generator[None]:
    """Take back what the model's own code stores on its modules while it runs on fake tensors."""
    saved = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, before in saved:
            attributes.clear()
            attributes.update(before)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep the exporter's notes to itself: they are about its own internals, or repeat an exception that follows."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


@contextlib.contextmanager
def _as_unsupported(model: PreTrainedModel, what: str) -> Generator[None]:
    """Turn whatever a model's own code raises into one sentence; the cause stays chained."""
    try:
        yield
    except QeffError:
        raise
    except Exception as error:
        # The exporter wraps what happened in advice about itself; the first cause is what tells.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = next((line for line in str(cause).splitlines() if line.strip()), "no message")
        raise UnsupportedModelError(
            f"{type(model).__name__} {what}: {type(cause).__name__}: {_ESCAPES.sub('', first)[:300]}"
        ) from error
