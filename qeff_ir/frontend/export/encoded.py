"""An encoder-decoder model becomes two modules: an encoder that makes cross-attention states, and a decoder given them.

Both are traced through the model's own forward pass. Where its cross-attention cache is empty, the run computes the
keys and values that its decoder reads, and these are all that the encoder's module returns; where it is filled, nothing
that only they need is left (`qeff_ir.frontend.capture.crossing`). So each value is computed where it depends on no more
than the encoder's inputs, and no name says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.exporters.exporter_dynamo import reset_model_state

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.frontend.capture.crossing import CrossCache
from qeff_ir.frontend.capture.forward_attention import captured_forward, encoding
from qeff_ir.frontend.capture.own_thread import alone
from qeff_ir.frontend.capture.states import CapturingCache
from qeff_ir.frontend.checkpoint.skeleton import evaluating, fake_weights
from qeff_ir.frontend.checkpoint.weights import Weights
from qeff_ir.frontend.export.given import Call, Given, GivenPort
from qeff_ir.frontend.export.lower import clean, convert, lower
from qeff_ir.frontend.export.own_code import as_unsupported, attributes_kept
from qeff_ir.frontend.export.quiet import quiet
from qeff_ir.frontend.export.spelling import cut_splits, drop_idle_squeezes
from qeff_ir.frontend.inputs import BATCH, InputSpec
from qeff_ir.frontend.private import export_patches
from qeff_ir.frontend.versions import cache_argument
from qeff_ir.garbage import settled
from qeff_ir.ir import operators
from qeff_ir.ir.module import Dim, Module, rename_symbols
from qeff_ir.ir.ports import CROSSING, FEATURE_LENGTH, FEATURES, FEATURES_MASK, TOKENS

Tensor = torch.Tensor

MASK = "attention_mask"
"""What transformers calls the mask of an encoder's inputs."""
_SELF = {"key": "self-key", "value": "self-value"}
"""Kinds of the decoder's own states, beside those of its cross-attention."""
_PREFIX = "encoder_"
"""Beginning of the names that the encoder's inputs have beside the decoder's."""
_ROWS = 2
"""Rows of the example run."""


class Encoded(Given):
    """What the encoder of a model is given.

    Args:
        specs: Its inputs, of one length.
    """

    tokens = "decoder_input_ids"
    positions = "decoder_position_ids"

    def __init__(self, specs: Sequence[InputSpec]) -> None:
        self.inputs = tuple(
            GivenPort(_PREFIX + s.name, s.shape, s.dtype, FEATURES_MASK if s.name == MASK else FEATURES) for s in specs
        )

    @contextlib.contextmanager
    def calling(self, model: PreTrainedModel, values: Mapping[str, Tensor], cache: CapturingCache) -> Generator[Call]:
        """See `Given.calling`."""
        values = {name.removeprefix(_PREFIX): value for name, value in values.items()}
        with encoding():
            encoded = _encode(model, values)
        yield Call(_arguments(model, values, encoded, cache.cross.beside(cache)), [])


def lower_decoder(model: PreTrainedModel, weights: Weights, specs: Sequence[InputSpec]) -> Module:
    """Lower the decoder, given cross-attention states.

    Args:
        model: As for `qeff_ir.frontend.export.lower.lower`.
        weights: As there.
        specs: Inputs of the encoder, ``batch_size`` and sizes.

    Returns:
        A module as of a causal LM, whose states are, for each layer, ``past_key_self``, ``past_value_self``
        ``[batch_size, heads, ctx_len, width]`` and ``past_key_cross``, ``past_value_cross`` ``[batch_size, heads,
        encoder_ctx, width]``, which the host writes; with an input ``encoder_attention_mask`` where the
        cross-attention has a mask.

    Raises:
        UnsupportedModelError: The decoder reads more of the encoder's output than its cross-attention cache holds, or
            see `qeff_ir.frontend.export.lower.lower`.
    """
    module = lower(model, weights, whole=True, given=Encoded(specs))
    name = type(model).__name__
    if not any(state.update == "once" for state in module.states):
        raise _whole(name)
    _take_batch_from_tokens(module)
    _spell_out_types(module)
    RemoveUnusedNodesPass()(module.model)
    for value in list(module.graph.inputs):
        if module.role_of(value) in (FEATURES, FEATURES_MASK) and not value.uses():
            module.graph.inputs.remove(value)
            del module.ports[str(value.name)]
        elif module.role_of(value) is FEATURES:
            raise UnsupportedModelError(
                f"the decoder of {name} reads its encoder's output in every run, and not only keys and values that are "
                "made of it once: it cannot be split into an encoder and a decoder"
            )
    _name_states(module)
    module.write_facts()
    return module


def _take_batch_from_tokens(module: Module) -> None:
    """Ask the tokens how many rows there are: nothing else of the encoder's output may matter but its sizes."""
    tokens = module.port(TOKENS)
    for node in module.graph:
        start, asked = node.attributes.get_int("start", 0), node.inputs[0] if node.op_type == "Shape" else None
        shape = None if asked is None else asked.shape
        if shape is not None and node.attributes.get_int("end", len(shape)) == start + 1 and shape[start] == BATCH:
            node.replace_input_with(0, tokens)
            node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)


def _spell_out_types(module: Module) -> None:
    """Cast to a type by its name, where that of a tensor is asked for: the tensor itself is not read then."""
    for node in list(module.graph):
        like = node.inputs[1] if node.op_type == "CastLike" else None
        if like is None or like.dtype is None:
            continue
        cast = ir.node("Cast", [node.inputs[0]], {"to": like.dtype.value}, metadata_props=node.metadata_props)
        ir.convenience.replace_nodes_and_values(module.graph, node, [node], [cast], node.outputs, cast.outputs)


def _name_states(module: Module) -> None:
    """Call the decoder's own states by what tells them from those of its cross-attention (AI 100 contract §1.7)."""
    for index, state in enumerate(module.states):
        named = dataclasses.replace(state, kind=_SELF.get(state.kind, state.kind))
        taken, result = module.input(state.input), module.output(state.output)
        taken.name, result.name = named.input, named.output
        module.residents[index] = named
    module.residents.sort(key=lambda resident: resident.order)
    ends = [(module.input(s.input), module.output(s.output)) for s in module.states]
    kept = {value for pair in ends for value in pair}
    graph = module.graph
    others = [value for value in graph.inputs if value not in kept]
    graph.inputs[:] = [*others, *(taken for taken, _ in ends)]
    others = [value for value in graph.outputs if value not in kept]
    graph.outputs[:] = [*others, *(result for _, result in ends)]


def lower_encoder(model: PreTrainedModel, weights: Weights, specs: Sequence[InputSpec]) -> Module:
    """Lower the encoder, and what the decoder's cross-attention makes of its output.

    Args:
        model: As for `qeff_ir.frontend.export.lower.lower`.
        weights: As there.
        specs: Its inputs, ``batch_size`` and sizes.

    Returns:
        A module without states, with these inputs (those that nothing reads are left out), and an output for each
        cross-attention state, by its name.

    Raises:
        UnsupportedModelError: The model cannot be traced, or keeps nothing in a cross-attention cache.
    """
    names, name = list[str](), type(model).__name__
    step = _EncoderStep(model, names)
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
            values = _ones(specs)
        what = "has an encoder that cannot be traced"
        with export_patches(), reset_model_state(model), as_unsupported(model, what):
            exported = torch.export.export(
                step,
                (),
                kwargs={"inputs": values},
                dynamic_shapes={"inputs": {s.name: {0: torch.export.Dim.DYNAMIC} for s in specs}},
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            drop_idle_squeezes(exported)
            cut_splits(exported)
            if not names:
                raise UnsupportedModelError(
                    f"{name} keeps nothing of its encoder's output in a cache: it cannot be split"
                )
            program = convert(exported, list(values), names)
    module = Module(clean(program.model, weights, []), f"{name}Encoder")
    RemoveUnusedNodesPass()(module.model)
    rename_symbols(module.graph, {str(v.shape[0]): BATCH for v in module.graph.inputs if v.shape is not None})
    module.dims = {BATCH: Dim(BATCH), FEATURE_LENGTH: Dim(FEATURE_LENGTH, given_length(specs))}
    for value in list(module.graph.inputs):
        if not value.uses():
            module.graph.inputs.remove(value)
        else:
            module.declare(value, FEATURES_MASK if value.name == MASK else FEATURES)
    for value in module.graph.outputs:
        module.declare(value, CROSSING)
    operators.attach(module.model)
    module.write_facts()
    return module


def encoded_length(model: PreTrainedModel, specs: Sequence[InputSpec]) -> int:
    """Positions of the encoder's output for inputs of these sizes, found on fake tensors.

    Raises:
        UnsupportedModelError: The encoder does not take them.
    """
    with (
        alone(),
        evaluating(model),
        torch.no_grad(),
        captured_forward(model),
        fake_weights(model) as fake,
        quiet(),
        attributes_kept(model),
        reset_model_state(model),
        export_patches(),
        as_unsupported(model, "has an encoder that cannot be run"),
        fake,
    ):
        return int(_encode(model, _ones(specs))[0].shape[1])


def given_length(specs: Sequence[InputSpec]) -> int:
    """Length of what the encoder is given: that of its mask, or the longest axis where it has none."""
    mask = next((s for s in specs if s.name == MASK), specs[0])
    return max(size for size in mask.shape[1:] if isinstance(size, int))


def _ones(specs: Sequence[InputSpec]) -> dict[str, Tensor]:
    """Inputs of an example run."""
    return {s.name: torch.ones([_ROWS if d == BATCH else int(d) for d in s.shape], dtype=s.dtype) for s in specs}


def _whole(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} keeps nothing of its encoder's output in a cache: it cannot be split")


class _EncoderStep(torch.nn.Module):
    """The cross-attention states as a function of the encoder's inputs, the function that is traced."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.hf = model
        self._note = lambda found: names.__setitem__(slice(None), found)  # tracing takes back what is set on a module

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        cross = CrossCache({})
        cache = cross.beside(DynamicCache())
        start = torch.zeros((next(iter(inputs.values())).shape[0], 1), dtype=torch.long)
        arguments = _arguments(self.hf, inputs, _encode(self.hf, inputs), cache)
        self.hf(decoder_input_ids=start, use_cache=True, **arguments)
        self._note([state.input for state in cross.found()])
        return tuple(tensor for _, made in sorted(cross.made.items()) for tensor in made)


def _encode(model: PreTrainedModel, values: Mapping[str, Tensor]) -> Any:
    """What the encoder returns, called as transformers' `generate` does."""
    encoder: Any = model.get_encoder()
    parameters = inspect.signature(encoder.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    given = {name: value for name, value in values.items() if anything or name in parameters}
    return encoder(**given, return_dict=True)


def _arguments(model: PreTrainedModel, values: Mapping[str, Tensor], encoded: Any, cache: Any) -> dict[str, object]:
    """Arguments of the whole model's forward pass beside tokens and positions."""
    found: dict[str, object] = {"encoder_outputs": encoded, cache_argument(model.forward): cache}
    if MASK in values and MASK in inspect.signature(model.forward).parameters:
        found[MASK] = values[MASK]
    return found
