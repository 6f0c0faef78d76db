"""The way a pass changes a module: every rewrite is admitted, counted and stamped with where it came from."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qeff_ir.errors import PassError
from qeff_ir.ir.module import PASS_KEY, SOURCE_KEY, Module
from qeff_ir.ir.sources import set_sources, sources_of
from qeff_ir.passing.hiding import hidden_weights
from qeff_ir.passing.inference import Inference
from qeff_ir.passing.report import Missed, PassStats

if TYPE_CHECKING:
    from onnxscript.rewriter import RewriteRule

Dims = Sequence[int | str | ir.SymbolicDim | None]
"""Sizes of axes: numbers, names, those of another shape, or `None` for one without a name."""

_LEAST_LIMIT = 1000
_REWRITES_PER_NODE = 20
_NODES_PER_REWRITE = 100
"""Bounds of what a pass that ends can do: far above any real one, and reached in seconds by one that loops."""


class OpBuilder:
    """Writes nodes before an anchor, or after it: ``b("MatMul", x, w)``; each inherits the sources of all anchors."""

    def __init__(self, rewriter: Rewriter, anchors: Sequence[ir.Node], *, after: bool = False) -> None:
        self._rewriter = rewriter
        self._anchors = anchors
        self._place = anchors[0]
        self._after = after

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        shape: Dims | ir.Shape | None = None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Insert one node with one output, and return that output.

        Its `shape` and `dtype` are what ONNX infers from the operator and its inputs, unless they are given.
        """
        (out,) = self.several(op_type, *inputs, domain=domain, shapes=[shape], dtype=dtype, **attributes)
        return out

    def several(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        shapes: Sequence[Dims | ir.Shape | None],
        domain: str = "",
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Insert one node with an output for each of `shapes` (`None` for one that is to be inferred); return them.

        ``gate, up = b.several("Split", both, sizes, axis=-1, shapes=[…, …])``
        """
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=len(shapes))
        self._rewriter.insert(node, self._place, after=self._after)
        if len(self._anchors) > 1:
            self._rewriter.stamp(node, *self._anchors)
        if self._after:
            self._place = node
        complete = dtype is not None and None not in shapes
        found = [(dtype, None)] * len(shapes) if complete else self._rewriter.inference.outputs(node)
        for out, shape, (own_dtype, own_shape) in zip(node.outputs, shapes, found, strict=True):
            shape = own_shape if shape is None else shape
            kind = own_dtype if dtype is None else dtype
            if shape is not None:
                out.shape = ir.Shape(shape)  # of its own: shapes can be changed
            if kind is not None:
                out.dtype = kind
        return tuple(node.outputs)

    def const(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant, shared by all its users in the graph (`int64` unless told otherwise)."""
        return self._rewriter.constant(np.asarray(value, dtype=dtype))


class Rewriter:
    """The way a pass changes the main graph: admits rewrites, counts them, and stamps provenance on new nodes.

    Attributes:
        module: The module being changed.
        stats: What has happened so far.
        budget: Rewrites that are admitted in all; `None` for no limit. Bisection sets it.
        count: Rewrites admitted so far.
        refused: Whether a rewrite was wanted after the budget was spent.
        done: Sites that were changed in place.
        inference: Tells what new nodes make.
    """

    def __init__(self, module: Module, pass_id: str, budget: int | None = None) -> None:
        self.module = module
        self.pass_id = pass_id
        self.stats = PassStats()
        self.budget = budget
        self.count = 0
        self.refused = False
        self.done: set[ir.Node] = set()
        self._limit = _LEAST_LIMIT + _REWRITES_PER_NODE * len(module.graph)
        self._inserted = 0
        self.inference = Inference(module.model.opset_imports)
        self._known = set(ir.traversal.RecursiveGraphIterator(module.graph))
        self._recent: deque[str] = deque(maxlen=6)

    @property
    def graph(self) -> ir.Graph:
        """The graph being rewritten."""
        return self.module.graph

    def rewrite(self, rule: str, *sites: ir.Node) -> bool:
        """Ask to make one rewrite, and count it under `rule`.

        A pass that changes the graph by other means than `replace` and `apply_rules` asks before each change, and
        leaves the site alone when the answer is no.

        Args:
            rule: What it is counted under.
            sites: Sites of the pass (`Pass.sites`) that stay in the graph and are changed in place: they are done,
                although they are still found after the pass.

        Returns:
            Whether the budget has room for it.

        Raises:
            PassError: The pass has made so many rewrites that it will not end.
        """
        if self.budget is not None and self.count >= self.budget:
            self.refused = True
            return False
        self.count += 1
        self.done.update(sites)
        self.stats.fired[rule] += 1
        self._recent.append(rule)
        if self.count > self._limit:
            raise PassError(f"it has made {self._limit} rewrites and does not end; {self._suspects()}")
        return True

    def _suspects(self) -> str:
        rules = sorted(set(self._recent))
        return (
            f"the rules '{rules[0]}' and '{rules[1]}' undo each other"
            if len(rules) == 2
            else f"the last were of {', '.join(repr(r) for r in rules)}"
        )

    def insert(self, node: ir.Node, anchor: ir.Node, *, after: bool = False) -> None:
        """Put a new node before `anchor`, or after it, stamped.

        Raises:
            PassError: The pass has inserted so many nodes that it will not end.
        """
        self._inserted += 1
        if self._inserted > _NODES_PER_REWRITE * self._limit:
            raise PassError(f"it has inserted {self._inserted - 1} nodes and does not end; the last was {node.op_type}")
        self.stamp(node, anchor)
        if after:
            self.graph.insert_after(anchor, node)
        else:
            self.graph.insert_before(anchor, node)

    def at(self, anchor: ir.Node, *others: ir.Node) -> OpBuilder:
        """A builder that inserts before `anchor`; what it makes has the sources of `anchor` and of all `others`.

        ``rewriter.at(gate, up)`` is for a node that takes the place of both.
        """
        return OpBuilder(self, (anchor, *others))

    def after(self, anchor: ir.Node, *others: ir.Node) -> OpBuilder:
        """A builder that inserts after `anchor`, one node after the other; see `at` for `others`."""
        return OpBuilder(self, (anchor, *others), after=True)

    def stamp(self, node: ir.Node, *anchors: ir.Node) -> None:
        """Record on `node` which pass made it, and that it stands for the sources of all anchors."""
        node.metadata_props[PASS_KEY] = self.pass_id
        set_sources(node, (source for anchor in anchors for source in sources_of(anchor)))

    def adopt(self) -> None:
        """Stamp the nodes that the pass made by other means; without a source, they take that of what they read.

        A library may have copied the stamp of what it replaced, which would tell of an earlier pass.
        """
        for node in ir.traversal.RecursiveGraphIterator(self.graph):
            if node in self._known:
                continue
            node.metadata_props[PASS_KEY] = self.pass_id
            if SOURCE_KEY not in node.metadata_props:
                makers = (v.producer() for v in node.inputs if v is not None)
                found = [m.metadata_props.get(SOURCE_KEY, "") for m in makers if m is not None]
                node.metadata_props[SOURCE_KEY] = max(found, key=len, default="")

    def know(self, node: ir.Node) -> None:
        """A node that is not new, although it is another object than before."""
        self._known.add(node)

    @contextlib.contextmanager
    def hidden_weights(self) -> Generator[None]:
        """Show the weights as graph inputs while a library works on the graph, so that it cannot read or fold them."""
        with hidden_weights(self.graph):
            yield

    def apply_rules(self, name: str, rules: Sequence[RewriteRule]) -> int:
        """Apply onnxscript rewrite rules to the graph, once at each node.

        Args:
            name: What each application counts under.
            rules: The rules; at a node, the first that matches is applied.

        Returns:
            How often they fired.
        """
        from qeff_ir.passing.rooted import rooted  # imports onnxscript, which takes long

        before, counted = self.count, [_Counted(rule, name, self) for rule in rules]
        functions = dict(self.module.model.functions)
        self.module.model.functions.clear()  # the bodies of ops say what the ops mean; rules must not change them
        try:
            with self.hidden_weights():
                rooted(cast("Sequence[RewriteRule]", counted)).apply_to_model(self.module.model)
        finally:
            self.module.model.functions.update(functions)
        if self.count > before:
            self.sweep()
        return self.count - before

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer with this value; equal constants are one initializer."""
        import hashlib

        digest = hashlib.sha256(array.tobytes()).hexdigest()[:8]
        dims = "x".join(map(str, array.shape)) or "scalar"
        name = f"const.{array.dtype}.{dims}.{digest}"
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        value = ir.val(name, const_value=ir.tensor(np.array(array), name=name))
        self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, value: ir.Value, rule: str | None = None) -> bool:
        """Let `value` take the place of the node's only output, in graph outputs too, and drop the node.

        Counts as one rewrite of `rule` (the operator's name by default).

        Returns:
            Whether it was done: it is not once the budget is spent.
        """
        if not self.rewrite(rule or node.op_type):
            return False
        self.substitute(node, value)
        return True

    def substitute(self, node: ir.Node, value: ir.Value) -> None:
        """What `replace` does, as a part of a larger rewrite that has been admitted already."""
        old = node.outputs[0]
        value.shape = _completed(value.shape, old.shape)
        if value.type is None:
            value.type = old.type
        if old.is_graph_output():
            index = next(i for i, o in enumerate(self.graph.outputs) if o is old)
            if value.is_graph_output() or value.is_graph_input():
                value = self.at(node)("Identity", value, shape=old.shape, dtype=old.dtype)
            name = old.name
            old.name = None
            value.name = name
            self.graph.outputs[index] = value
        old.replace_all_uses_with(value)
        self.graph.remove(node, safe=True)

    def missed(self, site: ir.Node, reason: str) -> None:
        """Record that a site was not rewritten, and why."""
        self.stats.missed.append(Missed.at(site, reason))

    def sweep(self) -> None:
        """Drop nodes and initializers that nothing uses any more."""
        common.RemoveUnusedNodesPass()(self.module.model)


def _completed(shape: ir.Shape | None, old: ir.Shape | None) -> ir.Shape | None:
    """A shape, with sizes that it leaves open taken from what it takes the place of."""
    if shape is None or old is None or len(shape) != len(old):
        return old if shape is None else shape
    pairs = zip(shape.dims, old.dims, strict=True)
    return ir.Shape([known if isinstance(own, ir.SymbolicDim) and own.value is None else own for own, known in pairs])


class _Counted:
    """A rule that asks the rewriter before each application; stands for it in a rule set."""

    def __init__(self, rule: RewriteRule, name: str, rewriter: Rewriter) -> None:
        self._rule = rule
        self._name = name
        self._rewriter = rewriter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement when the rule matches and is admitted, else `None`, which leaves the node alone."""
        found = self._rule.try_rewrite(*args, **kwargs)
        if found is None or not self._rewriter.rewrite(self._name):
            return None
        for node in found.new_nodes:  # now, for onnxscript copies the metadata of what it replaces to unstamped nodes
            self._rewriter.stamp(node, found.match.nodes[0])
        return found
