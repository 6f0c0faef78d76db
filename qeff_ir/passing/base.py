"""A pass is a frozen dataclass with a name, typed options, and a `run` that changes a module through a `Rewriter`.

    @register
    @dataclass(frozen=True, slots=True)
    class ScaleFold(Pass):
        \"\"\"Fold a scalar Mul into the weight of the MatMul before it.\"\"\"

        name: ClassVar[str] = "scale-fold"
        limit: float = 1e4

        def run(self, module: Module, rewriter: Rewriter) -> None: ...

The fields are the options; the pipeline text `scale-fold{limit=10}` sets them.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qeff_ir.errors import PipelineError
from qeff_ir.module import PASS_KEY, SOURCE_KEY, WEIGHT_KEY, Module

if TYPE_CHECKING:
    from onnxscript.rewriter import RewriteRule


@dataclass(frozen=True, slots=True)
class Missed:
    """A site that a pass looked at and did not rewrite.

    Attributes:
        source: Hugging Face module that the site came from.
        reason: Why, as one clause.
    """

    source: str
    reason: str


@dataclass
class PassStats:
    """What one run of a pass did.

    Attributes:
        fired: Rewrites by rule name.
        missed: Sites that were not rewritten.
    """

    fired: Counter[str] = field(default_factory=Counter[str])
    missed: list[Missed] = field(default_factory=list[Missed])


class Pass(ABC):
    """One named change of a module.

    Subclasses are frozen dataclasses whose fields are the options (bool, int, float, str, `Literal`, `Optional` of
    them), with a docstring that says what the pass needs and what it guarantees.

    Attributes:
        name: Stable name in pipelines, lower-case with dashes.
        requires: Properties that must hold before the pass.
        establishes: Properties that hold after it.
        invalidates: Properties that it may destroy.
        changes_interface: Whether it may change names, types or shapes of graph inputs and outputs, or states.
        all_sites: Whether a missed site is an error rather than a line in the report.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    changes_interface: ClassVar[bool] = False
    all_sites: ClassVar[bool] = False

    __slots__ = ()

    @abstractmethod
    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Change the module in place.

        Raises:
            PassError: The pass cannot keep its promise on this module; the manager restores the module.
        """


P = TypeVar("P", bound=Pass)
_REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[P]) -> type[P]:
    """Class decorator that makes a pass known by its name.

    Raises:
        PipelineError: Another class has that name.
    """
    known = _REGISTRY.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise PipelineError(f"two passes are named '{cls.name}': {known.__module__} and {cls.__module__}; rename one")
    _REGISTRY[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """All known passes by name, those of the `passes` package included."""
    import passes

    passes.load_all()
    return dict(sorted(_REGISTRY.items()))


class OpBuilder:
    """Writes nodes before an anchor: ``b("MatMul", x, w)``; each new node inherits the anchor's source."""

    def __init__(self, rewriter: Rewriter, anchor: ir.Node) -> None:
        self._rewriter = rewriter
        self._anchor = anchor

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        shape: Sequence[int | str] | ir.Shape | None = None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Insert one node with one output and return that output, typed when `shape` and `dtype` are given."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
        self._rewriter.stamp(node, self._anchor)
        self._rewriter.graph.insert_before(self._anchor, node)
        out = node.outputs[0]
        if shape is not None:
            out.shape = shape if isinstance(shape, ir.Shape) else ir.Shape(shape)
        if dtype is not None:
            out.dtype = dtype
        return out

    def const(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant, shared by all its users in the graph (`int64` unless told otherwise)."""
        return self._rewriter.constant(np.asarray(value, dtype=dtype))


class Rewriter:
    """The way a pass changes the main graph: stamps provenance on new nodes and counts what fired.

    Attributes:
        graph: The graph being rewritten.
        stats: What has happened so far.
    """

    def __init__(self, module: Module, pass_id: str) -> None:
        self.module = module
        self.graph = module.graph
        self.pass_id = pass_id
        self.stats = PassStats()

    def at(self, anchor: ir.Node) -> OpBuilder:
        """A builder that inserts before `anchor` and inherits its source."""
        return OpBuilder(self, anchor)

    def stamp(self, node: ir.Node, anchor: ir.Node) -> None:
        """Record on `node` which pass made it and which source it stands for."""
        node.metadata_props[PASS_KEY] = self.pass_id
        node.metadata_props[SOURCE_KEY] = anchor.metadata_props.get(SOURCE_KEY, "")

    def adopt(self) -> None:
        """Stamp nodes that a library made without a source: they take that of the node whose result they read."""
        for node in self.graph:
            if SOURCE_KEY in node.metadata_props:
                continue
            makers = (v.producer() for v in node.inputs if v is not None)
            known = [m.metadata_props[SOURCE_KEY] for m in makers if m is not None and SOURCE_KEY in m.metadata_props]
            node.metadata_props[SOURCE_KEY] = max(known, key=len, default="")
            node.metadata_props[PASS_KEY] = self.pass_id

    @contextlib.contextmanager
    def hidden_weights(self) -> Generator[None]:
        """Show the weights as graph inputs while a library works on the graph, so that it cannot read or fold them."""
        weights = [v for v in self.graph.initializers.values() if WEIGHT_KEY in v.metadata_props]
        tensors = [v.const_value for v in weights]
        for value in weights:
            assert value.name is not None
            del self.graph.initializers[value.name]
            value.const_value = None
            self.graph.inputs.append(value)
        try:
            yield
        finally:
            hidden = set(weights)
            for index in reversed(range(len(self.graph.inputs))):
                if self.graph.inputs[index] in hidden:
                    del self.graph.inputs[index]
            for value, tensor in zip(weights, tensors, strict=True):
                value.const_value = tensor
                self.graph.register_initializer(value)

    def apply_rules(self, name: str, rules: Sequence[RewriteRule]) -> int:
        """Apply onnxscript rewrite rules to the graph; returns how often they fired, counted under `name`."""
        from onnxscript.rewriter import RewriteRuleSet

        with self.hidden_weights():
            count = RewriteRuleSet(list(rules)).apply_to_model(self.module.model)
        self.adopt()
        self.sweep()
        if count:
            self.stats.fired[name] += count
        return count

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

    def replace(self, node: ir.Node, value: ir.Value, rule: str | None = None) -> None:
        """Let `value` take the place of the node's only output, in graph outputs too, and drop the node.

        Counts one firing of `rule` (the operator's name by default).
        """
        old = node.outputs[0]
        if value.shape is None:
            value.shape = old.shape
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
        self.stats.fired[rule or node.op_type] += 1

    def missed(self, site: ir.Node, reason: str) -> None:
        """Record that a site was not rewritten, and why."""
        self.stats.missed.append(Missed(site.metadata_props.get(SOURCE_KEY, "") or site.name or site.op_type, reason))

    def sweep(self) -> None:
        """Drop nodes and initializers that nothing uses any more."""
        common.RemoveUnusedNodesPass()(self.module.model)
