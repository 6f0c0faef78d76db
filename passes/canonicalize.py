"""Bring a graph into the form that all other passes match: folded, inlined, without duplicates or dead code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleSet, pattern
from onnxscript.rewriter.rules import common as rules

from qeff_ir.errors import PassError, QeffError
from qeff_ir.ir import operators
from qeff_ir.ir.module import Module
from qeff_ir.numerics import Exact, Numeric
from qeff_ir.passing.base import Pass, Rewriter, register
from qeff_ir.passing.hiding import LARGE
from qeff_ir.passing.matching import same_size
from qeff_ir.passing.rooted import rooted

# Not `optimizer.optimize_ir`: its default rules contain one with two results, which looks at every pair of slices and
# walks the graph for each node, so that its time grows with the square of the model; most others are for convolutions.
# Nor its rules for ``x + 0`` and ``x * 1``: they take 1e-8, which is the epsilon of some norms, for 0.
_ZERO = pattern.Constant(0, rel_tol=0.0, abs_tol=0.0)
_ONE = pattern.Constant(1, rel_tol=0.0, abs_tol=0.0)


def _neutral(match: Callable[[Any, Any], Any]) -> pattern.RewriteRule:
    return pattern.RewriteRule(match, lambda op, x: op.Identity(x))


_COMMUTATIVE = RewriteRuleSet(
    [_neutral(lambda op, x: op.Add(x, _ZERO)), _neutral(lambda op, x: op.Mul(x, _ONE))], commute=True
).rules
_RULES = rooted(
    [
        *_COMMUTATIVE,
        _neutral(lambda op, x: op.Sub(x, _ZERO)),
        _neutral(lambda op, x: op.Div(x, _ONE)),
        rules.dropout_zero_rule,
        rules.dropout_inference_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.two_reshapes_matmul_reshape_rule,
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.flatten_to_reshape_rule,
        rules.reshape_reshape_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
        rules.no_op_dynamic_scatter_nd_rule,
        rules.no_op_static_scatter_nd_rule,
    ]
)
_ROUNDS = 2


@register
@dataclass(frozen=True, slots=True)
class Canonicalize(Pass):
    """Fold constants, inline helper functions, merge equal nodes, drop what nothing uses (onnxscript's optimizer).

    Guarantees: no `Identity` between nodes, no constant subgraph, one initializer per constant, constant reshape
    targets wherever the shapes are known. Weights are never folded: they stay references.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})
    folds_constants: ClassVar[bool] = True
    numeric: ClassVar[Numeric] = Exact()

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Optimize in place; see the class."""
        if not rewriter.rewrite("optimize"):
            return
        before, declared = len(module.graph), [list(v.shape or ()) for v in module.graph.outputs]
        handed_on = _take_out(module.graph)
        # The optimizer inlines every function it finds; operators with a meaning of their own have to survive.
        for key in [k for k in module.model.functions if k[:2] in operators.known()]:
            del module.model.functions[key]
        with _taking("inline a function of"):
            common.InlinePass()(module.model)
        for _ in range(_ROUNDS):
            with rewriter.hidden_weights(), _taking("optimize"):
                _optimize(module.model)
            for node in module.graph:
                if node.op_type == "Reshape" and node.domain == "":
                    _fix_reshape(node, rewriter)
            rewriter.sweep()
        for index, value in handed_on:
            module.graph.outputs.insert(index, value)
        _forget_computed_sizes(module, declared)
        operators.attach(module.model)
        rewriter.stats.fired["removed"] = before - len(module.graph)


@contextlib.contextmanager
def _taking(verb: str) -> Generator[None]:
    """What the libraries say of a graph that is no sound ONNX, as a sentence.

    Raises:
        PassError: In place of any error of theirs.
    """
    try:
        yield
    except QeffError:
        raise
    except Exception as error:  # each of their passes raises types of its own
        said = " ".join(str(error).split())[:300]
        raise PassError(
            f"onnx_ir cannot {verb} this graph ({type(error).__name__}: {said}): export it again"
        ) from error


def _optimize(model: ir.Model) -> None:
    """Simplify until nothing changes, in a few rounds at most; then merge what is equal."""
    for _ in range(_ROUNDS):
        folded = optimizer.fold_constants(model, onnx_shape_inference=True, output_size_limit=LARGE // 4)
        fired = _RULES.apply_to_model(model)
        common.RemoveUnusedNodesPass()(model)
        if not folded and not fired:
            break
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _take_out(graph: ir.Graph) -> list[tuple[int, ir.Value]]:
    """Remove outputs that are inputs or other outputs too, which the optimizer would rename; their places, in order."""
    outputs = list(graph.outputs)
    found = [(i, value) for i, value in enumerate(outputs) if value.is_graph_input() or value in outputs[:i]]
    for index, _ in reversed(found):
        del graph.outputs[index]
    return found


def _forget_computed_sizes(module: Module, declared: Sequence[Sequence[int | ir.SymbolicDim]]) -> None:
    """Take off the formulas that the optimizer found for sizes of outputs: only declared dims have a name."""
    for value, old in zip(module.graph.outputs, declared, strict=True):
        if value.shape is not None and any(_is_formula(d, module) for d in value.shape):
            before = old if len(old) == len(value.shape) else [ir.SymbolicDim(None)] * len(value.shape)
            dims = [b if _is_formula(d, module) else d for d, b in zip(value.shape, before, strict=True)]
            value.shape = ir.Shape(dims)


def _is_formula(dim: int | ir.SymbolicDim, module: Module) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value not in module.dims


def _keeps_shape(data: ir.Value, out: ir.Value) -> bool:
    """Whether all sizes are known before and after, and are the same; not where an output would get another name."""
    known = data.shape is not None and out.shape is not None and all(isinstance(d, int) for d in data.shape)
    return known and data.shape == out.shape and not out.is_graph_output()


def _fix_reshape(node: ir.Node, rewriter: Rewriter) -> None:
    """Replace a computed target by a constant one: 0 keeps an axis, one unknown axis becomes -1.

    Where the sizes are those of before, nothing is left of it.
    """
    data, target = node.inputs
    out = node.outputs[0].shape
    if data is not None and _keeps_shape(data, node.outputs[0]):
        rewriter.replace(node, data, "reshape to the same shape")
        return
    if data is None or target is None or target.const_value is not None or out is None or data.shape is None:
        return
    dims: list[int] = []
    for axis, dim in enumerate(out):
        if isinstance(dim, int):
            dims.append(dim)
        elif axis < len(data.shape) and same_size(data.shape[axis], dim) and -1 not in dims:
            dims.append(0)
        elif -1 not in dims:
            dims.append(-1)
        else:
            return
    if 0 in [d for d, o in zip(dims, out, strict=True) if isinstance(o, int)]:
        return
    if rewriter.rewrite("constant reshape"):
        node.replace_input_with(1, rewriter.constant(np.asarray(dims, dtype=np.int64)))
        node.attributes.pop("allowzero", None)
