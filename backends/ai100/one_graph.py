"""An encoder and its decoder in one graph, which the AI 100 compiles for two sizes of features (contract §1.7).

A run with features writes the cross-attention states. A run with features of length 1 keeps them, whatever the encoder
makes of these: every size is fixed in a specialization, so that the compiler sees which branch is taken.
"""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.errors import CompileError
from qeff_ir.ir.joining import absorb
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import ENCODER_CONTEXT, FEATURE_LENGTH, FEATURES, FEATURES_MASK

_PREFIX = "encoder_"
"""Beginning of the names of what the encoder has beside the decoder."""


def join(decoder: Module, encoder: Module) -> Module:
    """The decoder with the encoder in its graph.

    Args:
        decoder: From `qeff_ir.frontend.export.encoded.lower_decoder`; changed.
        encoder: From `lower_encoder`, of the same model; used up.

    Raises:
        CompileError: The encoder takes several inputs beside its mask.
    """
    features = [value for value in encoder.graph.inputs if encoder.role_of(value) is FEATURES]
    if len(features) != 1:
        names = ", ".join(str(v.name) for v in encoder.graph.inputs)
        raise CompileError(f"the encoder of {decoder.name} takes {names}: the AI 100 contract knows one input (§1.7)")
    mask = encoder.find(FEATURES_MASK)
    if mask is not None:
        mask.replace_all_uses_with(_mask(decoder, mask))
    made = absorb(decoder.graph, encoder.graph, _PREFIX)
    whole, keep = _features(decoder, features[0], encoder.dims[FEATURE_LENGTH])
    features[0].replace_all_uses_with(whole)
    for index, state in enumerate(decoder.states):
        if state.input in made:
            _write(decoder, index, made[state.input], keep)
    decoder.graph.sort()
    decoder.write_facts()
    return decoder


def _mask(decoder: Module, mask: ir.Value) -> ir.Value:
    """The mask that the decoder has already, or one of its own."""
    found = decoder.find(FEATURES_MASK)
    if found is not None:
        return found
    made = ir.val(f"{_PREFIX}{mask.name}", shape=mask.shape, type=mask.type)
    decoder.graph.inputs.insert(2, made)
    return decoder.declare(made, FEATURES_MASK)


def _features(decoder: Module, old: ir.Value, dim: Dim) -> tuple[ir.Value, ir.Value]:
    """The features in their whole length, and whether they have the length 1."""
    assert old.shape is not None and dim.maximum is not None
    axis = 1 + list(old.shape.dims[1:]).index(dim.maximum)
    taken = {str(value.name) for value in decoder.graph.inputs}
    name = f"{_PREFIX}{old.name}" if old.name in taken else str(old.name)
    shape = ir.Shape([FEATURE_LENGTH if at == axis else size for at, size in enumerate(old.shape.dims)])
    given = decoder.declare(ir.val(name, shape=shape, type=old.type), FEATURES)
    decoder.graph.inputs.insert(0, given)
    decoder.dims[FEATURE_LENGTH] = dim
    sizes = [size if isinstance(size, int) else 1 for size in old.shape.dims]
    nodes = [
        *(ir.node("Constant", [], {"value": ir.tensor(n, dtype=ir.DataType.INT64)}) for n in (sizes, [1])),
        ir.node("Shape", [given], {"start": axis, "end": axis + 1}),
    ]
    whole, one, length = (node.outputs[0] for node in nodes)
    nodes += [ir.node("Expand", [given, whole]), ir.node("Equal", [length, one])]
    expanded, keep = (node.outputs[0] for node in nodes[3:])
    expanded.shape, expanded.type = old.shape, old.type
    length.shape, length.dtype = ir.Shape([1]), ir.DataType.INT64
    keep.shape, keep.dtype = ir.Shape([1]), ir.DataType.BOOL
    decoder.graph.insert_before(next(iter(decoder.graph)), nodes)
    return expanded, keep


def _write(decoder: Module, index: int, new: ir.Value, keep: ir.Value) -> None:
    """Let a state be what the encoder makes, unless the run is to keep it."""
    state = decoder.states[index]
    old = decoder.input(state.input)
    written = ir.node("Where", [keep, new, new])
    (out,) = written.outputs
    out.shape, out.type = new.shape, new.type
    decoder.graph.append(written)
    old.replace_all_uses_with(out)
    written.replace_input_with(1, old)
    length = state.shape[2]
    assert isinstance(length, int)
    decoder.dims[ENCODER_CONTEXT] = Dim(ENCODER_CONTEXT, length)
