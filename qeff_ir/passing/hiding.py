"""Keep weights out of the sight of libraries that would read, fold or copy them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import onnx_ir as ir

from qeff_ir.ir.module import WEIGHT_KEY

LARGE = 1024
"""Constants of more bytes count as weights; up to this size they are arithmetic: a pass may add and drop them."""


@contextlib.contextmanager
def hidden_weights(graph: ir.Graph) -> Generator[None]:
    """Show the weights of a graph, and constants as large as one, as graph inputs behind the real ones."""
    weights = [
        v
        for v in graph.initializers.values()
        if WEIGHT_KEY in v.metadata_props or (v.const_value is not None and v.const_value.nbytes > LARGE)
    ]
    tensors = [v.const_value for v in weights]
    for value in weights:
        assert value.name is not None
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        hidden = set(weights)
        for index in reversed(range(len(graph.inputs))):
            if graph.inputs[index] in hidden:
                del graph.inputs[index]
        for value, tensor in zip(weights, tensors, strict=True):
            value.const_value = tensor
            graph.register_initializer(value)
