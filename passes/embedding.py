"""Pool the hidden states of a text's tokens into one embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module, OutputSizes
from qeff_ir.ir.ports import MASK
from qeff_ir.ir.residents import DimValue
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AtLeast, Expect

_LOWEST = -65504.0
"""Stands for a padded token in a maximum: the least finite half."""
_FLOAT = ir.DataType.FLOAT

OUTPUT = "output"
"""Name of the embedding (AI 100 contract §1.10)."""


@register
@dataclass(frozen=True, slots=True)
class Embedding(Pass):
    """Make one embedding of each row, ``output``, float ``[batch, features]``, the only output.

    ``pooling`` is ``mean``, ``max``, ``cls`` (the first token), ``last``, ``mean-sqrt-len``, ``weighted-mean`` (token
    *i* of a text counts *i* times), or several of them joined by ``+``, whose results are concatenated; the formulas
    are those of sentence-transformers. ``none`` leaves one vector for each token. Only tokens that ``attention_mask``
    marks count, on whichever side the padding is; a row of padding gives zeros. Without a mask of these tokens, all
    do. ``dim`` keeps the first features (Matryoshka embeddings), then ``normalize`` scales to unit length.

    The first output of the graph is what is pooled. Weights that only other outputs need are dropped.
    """

    name: ClassVar[str] = "embedding"
    phase: ClassVar[Phase] = Phase.ADAPT
    changes_interface: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True
    expect: ClassVar[Expect] = AtLeast(1)

    pooling: str = field(default="mean", metadata={"help": "how tokens become one vector"})
    normalize: bool = field(default=False, metadata={"help": "scale to unit length"})
    dim: int | None = field(default=None, metadata={"help": "features to keep"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Put the embedding in place of the outputs.

        Raises:
            PassError: The pooling is unknown, there are no token vectors to pool, or fewer features than `dim`.
        """
        modes = check_pooling(self.pooling)
        hidden = module.graph.outputs[0]
        width = hidden.shape[-1] if hidden.shape is not None and len(hidden.shape) in (2, 3) else None
        if modes and (hidden.shape is None or len(hidden.shape) != 3 or not isinstance(width, int)):
            raise PassError(
                f"the output '{hidden.name}' is {hidden.shape}, not [batch, tokens, features]: it cannot be pooled"
            )
        features = width * max(1, len(modes)) if isinstance(width, int) else 0
        if self.dim is not None and not 1 <= self.dim <= features:
            raise PassError(f"dim is {self.dim}, but an embedding has {features} features: give 1 to {features}")
        if not rewriter.rewrite(self.pooling):
            return
        last = next(reversed(list(module.graph)))
        anchor = ir.node("Identity", [hidden])  # holds the place at the end; dropped below
        module.graph.insert_after(last, anchor)
        b = rewriter.at(anchor)
        value = hidden
        if modes:
            tokens = _Tokens(hidden, _mask(module, hidden), b)
            value = _joined([_POOLINGS[mode](tokens) for mode in modes], b)
        if self.dim is not None:
            value = b("Slice", value, b.const([0]), b.const([self.dim]), b.const([-1]))
        if self.normalize:
            value = unit(value, b)
        self._deliver(module, value, hidden, anchor, rewriter)

    def _deliver(self, module: Module, value: ir.Value, hidden: ir.Value, anchor: ir.Node, rewriter: Rewriter) -> None:
        graph = module.graph
        assert hidden.shape is not None
        features = self.dim if self.dim is not None else _features(hidden, check_pooling(self.pooling))
        inner = hidden.shape.dims[1:-1] if self.pooling == "none" else ()
        if value is hidden:
            graph.outputs.clear()
            taken = hidden.is_graph_input()
            value = rewriter.at(anchor)("Identity", hidden) if taken else hidden
        known = None if module.padding is None else module.padding.sizes(str(hidden.name))
        if value is not hidden and hidden.name == OUTPUT:
            hidden.name = f"{OUTPUT}.whole"
        if module.padding is not None:
            counts = self.pooling == "none" or _mask(module, hidden) is not None  # without a mask, padding would count
            sizes: list[tuple[DimValue, ...]] = []
            if known is not None and counts:
                last = features if isinstance(features, int) else known[-1]
                sizes = [(known[0], *(known[1:-1] if inner else ()), last)]
            module.padding = replace(module.padding, outputs=tuple(OutputSizes(OUTPUT, size) for size in sizes))
        value.name, value.dtype = OUTPUT, _FLOAT
        value.shape = ir.Shape([hidden.shape[0], *inner, features])
        graph.outputs[:] = [value]
        graph.remove(anchor, safe=True)
        rewriter.sweep()


def check_pooling(pooling: str) -> list[str]:
    """The modes that a pooling joins; none for ``none``.

    Raises:
        PassError: One is unknown.
    """
    modes = [] if pooling == "none" else pooling.split("+")
    for mode in modes:
        if mode not in _POOLINGS:
            raise PassError(f"there is no pooling '{mode}': use {', '.join(_POOLINGS)}, several joined by '+', or none")
    return modes


def _mask(module: Module, hidden: ir.Value) -> ir.Value | None:
    """The mask of the tokens that the hidden states are of; none where the model makes other tokens of its inputs."""
    mask = module.find(MASK)
    if mask is None or mask.shape is None or hidden.shape is None or len(hidden.shape) != 3:
        return None
    return mask if mask.shape[1] == hidden.shape[1] else None


class _Tokens:
    """The hidden states, ``[batch, tokens, features]``, and what poolings share about which of them count.

    Args:
        hidden: The states.
        mask: 1 for tokens that count, int64 ``[batch, tokens]``; `None` when all do.
        b: Where to write.
    """

    def __init__(self, hidden: ir.Value, mask: ir.Value | None, b: OpBuilder) -> None:
        self.hidden, self.b = hidden, b
        self.some: ir.Value | None = None
        if mask is None:
            one = b("Slice", hidden, b.const([0]), b.const([1]), b.const([2]))
            ones = b("Add", b("Mul", one, self.number(0.0)), self.number(1.0))
            self.mask = b("Squeeze", ones, b.const([2]))
        else:
            self.mask = b("Cast", mask, to=_FLOAT)
            self.some = b("ReduceMax", self.mask, b.const([1]), keepdims=1)

    def number(self, value: float) -> ir.Value:
        """A float constant."""
        return self.b.const(value, np.float32)

    def total(self, values: ir.Value) -> ir.Value:
        """Sums over the tokens, ``[batch, 1]``."""
        return self.b("ReduceSum", values, self.b.const([1]), keepdims=1)

    def weighted(self, weights: ir.Value) -> ir.Value:
        """Sums of the states with these weights ``[batch, tokens]``."""
        product = self.b("MatMul", self.b("Unsqueeze", weights, self.b.const([1])), self.hidden)
        return self.b("Squeeze", product, self.b.const([1]))

    def at(self, index: ir.Value) -> ir.Value:
        """The state at one column of each row, ``[batch, 1]``; zeros for a row of padding."""
        picked = self.b("GatherND", self.hidden, index, batch_dims=1)
        return self.nothing(picked)

    def nothing(self, pooled: ir.Value) -> ir.Value:
        """Zeros for the rows of padding."""
        return pooled if self.some is None else self.b("Mul", pooled, self.some)


def _mean(t: _Tokens) -> ir.Value:
    count = t.b("Max", t.total(t.mask), t.number(1.0))
    return t.weighted(t.b("Div", t.mask, count))  # weights first: a sum over long texts would leave half range


def _mean_sqrt_len(t: _Tokens) -> ir.Value:
    count = t.b("Max", t.total(t.mask), t.number(1.0))
    return t.weighted(t.b("Div", t.mask, t.b("Sqrt", count)))


def _weighted_mean(t: _Tokens) -> ir.Value:
    """N. Muennighoff, "SGPT: GPT Sentence Embeddings for Semantic Search", 2022; token 1 is the first that counts."""
    b = t.b
    length = b("Squeeze", b("Shape", t.mask, start=1, end=2))
    ramp = b("Cast", b("Range", b.const(1), b("Add", length, b.const(1)), b.const(1)), to=_FLOAT)
    first = b("Cast", _first(t), to=_FLOAT)
    share = b("Div", b("Sub", ramp, first), b("Cast", length, to=_FLOAT))  # at most 1: keeps sums in half range
    weights = b("Mul", share, t.mask)
    least = b("Div", t.number(1.0), b("Cast", length, to=_FLOAT))  # the weight of a text of one token
    return t.weighted(b("Div", weights, b("Max", t.total(weights), least)))


def _max(t: _Tokens) -> ir.Value:
    counts = t.b("Cast", t.b("Unsqueeze", t.mask, t.b.const([2])), to=ir.DataType.BOOL)
    values = t.b("Where", counts, t.hidden, t.number(_LOWEST))
    return t.nothing(t.b("ReduceMax", values, t.b.const([1]), keepdims=0))


def _first(t: _Tokens) -> ir.Value:
    return t.b("ArgMax", t.mask, axis=1, keepdims=1)


def _cls(t: _Tokens) -> ir.Value:
    return t.at(_first(t))


def _last(t: _Tokens) -> ir.Value:
    return t.at(t.b("ArgMax", t.mask, axis=1, keepdims=1, select_last_index=1))


_POOLINGS: dict[str, Callable[[_Tokens], ir.Value]] = {
    "mean": _mean,
    "max": _max,
    "cls": _cls,
    "last": _last,
    "mean-sqrt-len": _mean_sqrt_len,
    "weighted-mean": _weighted_mean,
}


def _joined(values: list[ir.Value], b: OpBuilder) -> ir.Value:
    return values[0] if len(values) == 1 else b("Concat", *values, axis=-1)


def unit(value: ir.Value, b: OpBuilder) -> ir.Value:
    """The vectors divided by their length, zeros staying zeros.

    They are scaled to a largest entry of 1 first: squares of half precision numbers overflow at 256.
    """
    one, axis = b.const(1.0, np.float32), b.const([-1])
    largest = b("ReduceMax", b("Abs", value), axis, keepdims=1)
    scaled = b("Div", value, b("Where", b("Greater", largest, b.const(0.0, np.float32)), largest, one))
    squares = b("ReduceSum", b("Mul", scaled, scaled), axis, keepdims=1)
    return b("Div", scaled, b("Sqrt", b("Max", squares, one)))


def _features(hidden: ir.Value, modes: list[str]) -> int | ir.SymbolicDim:
    assert hidden.shape is not None
    width = hidden.shape[-1]
    return width * max(1, len(modes)) if isinstance(width, int) else width
