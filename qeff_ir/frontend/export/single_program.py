"""An encoder of pictures and its language model in one graph, which takes pixels and tokens (AI 100 contract §1.8).

The pixels of all prompts stay on the device, and every prefill run encodes them, so that a picture may span runs. A run
of one token takes the vectors of its tokens whatever the encoder makes: a compiler with fixed sizes sees that, and
leaves the encoder out of decode runs.
"""

from __future__ import annotations

import onnx_ir as ir

from qeff_ir.errors import UnsupportedModelError
from qeff_ir.ir import dialect
from qeff_ir.ir.joining import absorb
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import PIXELS, POSITIONS
from qeff_ir.ir.residents import KINDS

_BATCH = "batch_size"


def join(language: Module, encoder: Module, *, batched: bool) -> Module:
    """The language model with the encoder in its graph.

    Args:
        language: From `qeff_ir.frontend.export.pictures.lower_language`; changed.
        encoder: From `qeff_ir.frontend.export.encoders.lower_encoder`, of the same model, for as many pictures as all
            rows of the batch may have; used up.
        batched: Whether the first axis of the pixels counts the rows of the batch.

    Raises:
        UnsupportedModelError: The encoder takes several inputs.
    """
    if len(encoder.graph.inputs) != 1:
        names = ", ".join(str(value.name) for value in encoder.graph.inputs)
        raise UnsupportedModelError(
            f"the encoder of {language.name} takes {names}: one program for pictures and text takes one input beside "
            "tokens, so leave out kv_offload=False"
        )
    (old,) = encoder.graph.inputs
    made = absorb(language.graph, encoder.graph, "encoder_")
    old.replace_all_uses_with(_pixels(language, old, batched=batched))
    for name, rows in made.items():
        _replace(language, language.input(name), rows)
    _skip(language)
    language.graph.sort()
    language.write_facts()
    return language


def _pixels(language: Module, old: ir.Value, *, batched: bool) -> ir.Value:
    """The new input, whose first axis may be the batch's; the encoder gets it in sizes that are fixed."""
    assert old.shape is not None
    sizes = [int(size) for size in old.shape.numpy()]
    shape = [_BATCH, *sizes[1:]] if batched else sizes
    given = language.declare(ir.val(KINDS["pixels"].input, shape=ir.Shape(shape), type=old.type), PIXELS)
    language.graph.inputs.insert(0, given)
    return _reshaped(language.graph, given, sizes, old.shape) if batched else given


def _replace(language: Module, old: ir.Value, rows: ir.Value) -> None:
    """Let the language model read what the encoder makes, ``[..., 1, batch * rows, width]``, as rows of each prompt."""
    assert old.shape is not None
    sizes = [size if isinstance(size, int) else -1 for size in old.shape.dims]
    old.replace_all_uses_with(_reshaped(language.graph, rows, sizes, old.shape))
    language.graph.inputs.remove(old)
    del language.ports[str(old.name)]


def _reshaped(graph: ir.Graph, value: ir.Value, sizes: list[int], shape: ir.Shape) -> ir.Value:
    constant = ir.node("Constant", [], {"value": ir.tensor(sizes, dtype=ir.DataType.INT64)})
    node = ir.node("Reshape", [value, constant.outputs[0]])
    node.outputs[0].shape, node.outputs[0].type = shape, value.type
    graph.extend([constant, node])
    return node.outputs[0]


def _skip(language: Module) -> None:
    """Let a run of one token take the vectors of its tokens."""
    one = ir.node("Constant", [], {"value": ir.tensor([1], dtype=ir.DataType.INT64)})
    length = ir.node("Shape", [language.port(POSITIONS)], {"start": 1, "end": 2})
    alone = ir.node("Equal", [length.outputs[0], one.outputs[0]])
    for value, dtype in ((length.outputs[0], ir.DataType.INT64), (alone.outputs[0], ir.DataType.BOOL)):
        value.shape, value.dtype = ir.Shape([1]), dtype
    merges = [n for n in language.graph if n.domain == dialect.DOMAIN and n.op_type == "MergeRows"]
    language.graph.extend([one, length, alone])
    for node in merges:
        plain, merged = node.inputs[0], node.outputs[0]
        chosen = ir.node("Where", [alone.outputs[0], plain, merged])
        chosen.outputs[0].shape, chosen.outputs[0].type = merged.shape, merged.type
        merged.replace_all_uses_with(chosen.outputs[0])
        chosen.replace_input_with(2, merged)
        language.graph.append(chosen)
