"""A pass that changes states and weights: key/value heads are copied, so that each of several devices has its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.ir.module import WEIGHT_KEY, Module
from qeff_ir.passing import Pass, Phase, Rewriter
from qeff_ir.passing.weights import Stored, repeated, stored

Sizes = tuple[int, int]
"""Key/value heads, and the width of one."""


@dataclass(frozen=True, slots=True)
class ReplicateKvHeads(Pass):
    """Give each key/value head `times` copies, by weights that are repeated (AI 100 contract §3).

    Attention answers the same, as the query heads of a group are spread over the copies of its head.
    """

    name: ClassVar[str] = "replicate-kv-heads"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_interface: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True

    times: int = dataclasses.field(default=2, metadata={"help": "copies of each head"})

    def sites(self, module: Module) -> list[ir.Node]:
        """What reads the caches of keys and values; it stays."""
        return [node for attentions in _pairs(module).values() for node in attentions]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Copy the heads of each pair of caches."""
        for updates, attentions in _pairs(module).items():
            found = [_branch(update) for update in updates]
            reason = next((b for b in found if isinstance(b, str)), None) or _unfit(updates, attentions, self.times)
            if reason is not None:
                for node in attentions:
                    rewriter.missed(node, reason)
            elif rewriter.rewrite("heads", *attentions):
                for update, branch in zip(updates, found, strict=True):
                    assert isinstance(branch, Branch)
                    branch.replicate(module, rewriter, update, self.times)
        rewriter.sweep()


def _pairs(module: Module) -> dict[tuple[ir.Node, ir.Node], list[ir.Node]]:
    """The updates of keys and values, and the attention that reads them."""
    found: dict[tuple[ir.Node, ir.Node], list[ir.Node]] = {}
    for node in module.graph:
        if node.op_type == "Attention":
            keys, values = (value and value.producer() for value in node.inputs[1:3])
            if keys is not None and values is not None and keys.op_type == values.op_type == "CacheUpdate":
                found.setdefault((keys, values), []).append(node)
    return found


def _unfit(updates: tuple[ir.Node, ir.Node], attentions: list[ir.Node], times: int) -> str | None:
    """Why a pair of caches cannot have more heads."""
    for update in updates:
        if any(user not in attentions for user in update.outputs[0].consumers()):
            return "something else than attention reads the cache"
    heads = _static(updates[0].inputs[1])[1]
    queries = [_static(node.inputs[0])[1] for node in attentions]
    if any(not isinstance(q, int) or not isinstance(heads, int) or q % (heads * times) for q in queries):
        return f"the query heads are not divided by {times} times the key/value heads"
    return None


def _static(value: ir.Value | None) -> list[int | str | None]:
    assert value is not None and value.shape is not None and len(value.shape) == 4
    return [d if isinstance(d, int) else None for d in value.shape.dims]


@dataclass(frozen=True)
class Branch:
    """What computes the keys or values of a layer from its input.

    Attributes:
        weight: Of the product that it begins with.
        nodes: The product, and all that follows up to the update of the cache.
        sizes: Of its heads.
    """

    weight: Stored
    nodes: list[ir.Node]
    sizes: Sizes

    def replicate(self, module: Module, rewriter: Rewriter, update: ir.Node, times: int) -> None:
        """Repeat the weights, and tell every value and the state of its size."""
        heads, width = self.sizes
        product = self.nodes[0]
        weight = self._repeated(rewriter, self.weight.value, self.weight.out_axis, times)
        if self.weight.transposed:
            weight = rewriter.at(product)("Transpose", weight, perm=[1, 0])
        product.replace_input_with(1, weight)
        for node in self.nodes:
            flat = node.outputs[0].shape is not None and len(node.outputs[0].shape) == 3
            for index, value in enumerate(node.inputs):
                if value is not None and flat and _is_of_features(value, heads * width):
                    node.replace_input_with(index, self._repeated(rewriter, value, 0, times))
            for out in node.outputs:
                _widen(out, self.sizes, times)
            if node.op_type == "Reshape":
                node.replace_input_with(1, rewriter.at(node).const(_target(node)))
        state = next(s for s in module.states if s.output == update.outputs[0].name)
        wide = (state.shape[0], heads * times, *state.shape[2:])
        module.residents[module.residents.index(state)] = dataclasses.replace(state, shape=wide)
        for value in (module.input(state.input), update.outputs[0]):
            value.shape = ir.Shape(wide)

    def _repeated(self, rewriter: Rewriter, value: ir.Value, axis: int, times: int) -> ir.Value:
        name = f"{value.metadata_props[WEIGHT_KEY]}_{times}_times"
        known = rewriter.graph.initializers.get(name)
        return known if known is not None else repeated(rewriter, name, value, axis, self.sizes[1], times)


def _branch(update: ir.Node) -> Branch | str:
    """The branch that ends in an update, or why it cannot be followed."""
    new = update.inputs[1]
    if (
        new is None
        or new.shape is None
        or not isinstance(heads := new.shape[1], int)
        or not isinstance(width := new.shape[3], int)
    ):
        return "the sizes of the heads are not known"
    sizes = heads, width
    above: dict[ir.Node, None] = {}
    products: dict[ir.Node, Stored] = {}
    todo = [new.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in above:
            continue
        above[node] = None
        weight = stored(node)
        if weight is None:
            todo += [value.producer() for value in node.inputs if value is not None]
        else:
            products[node] = weight
    if len(products) != 1:
        return f"{len(products)} products with weights make the keys or values, not one"
    ((product, weight),) = products.items()
    nodes = [product]
    for node in nodes:  # grows
        for user in (user for out in node.outputs for user in out.consumers()):
            if user in above and user not in nodes:
                nodes.append(user)
            elif user not in above and user is not update:
                return "something else reads what becomes the keys or values"
    if not all(_follows(node, sizes) for node in nodes) or weight.features[1] != sizes[0] * sizes[1]:
        return "heads are not told apart on the way to the cache"
    return Branch(weight, nodes, sizes)


def _follows(node: ir.Node, sizes: Sizes) -> bool:
    """Whether a node does to each head what it does to the others."""
    if "num_heads" in node.attributes or any(_head_axis(out, sizes) is None for out in node.outputs):
        return False
    if node.op_type == "Reshape":
        return node.inputs[0] is not None and _target(node) is not None
    constants = [v for v in node.inputs if v is not None and v.is_initializer() and v.shape is not None]
    flat = all(len(v.shape or ()) <= 1 for v in constants)
    return stored(node) is not None or flat or sizes[0] == 1


def _target(node: ir.Node) -> list[int] | None:
    """What a `Reshape` is told, by its result; `None` where axes of unknown length move."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None and source.shape is not None and result.shape is not None
    dims, told = list(source.shape.dims), [d if isinstance(d, int) else 0 for d in result.shape.dims]
    moved = [d for d, old in zip(result.shape.dims, dims, strict=False) if not isinstance(d, int) and d != old]
    return None if moved else told


def _is_of_features(value: ir.Value, features: int) -> bool:
    """Whether a weight has a number for each feature of all heads."""
    return WEIGHT_KEY in value.metadata_props and value.shape is not None and list(value.shape) == [features]


def _head_axis(value: ir.Value, sizes: Sizes) -> int | None:
    """The axis of the heads, or of the features of all of them."""
    if value.shape is None:
        return None
    if len(value.shape) == 3:
        return 2 if value.shape[2] == sizes[0] * sizes[1] else None
    found = [axis for axis in (1, 2) if len(value.shape) > 3 and isinstance(value.shape[axis], int)]
    return found[0] if len(found) == 1 and value.shape[found[0]] == sizes[0] else None


def _widen(value: ir.Value, sizes: Sizes, times: int) -> None:
    axis = _head_axis(value, sizes)
    assert axis is not None and value.shape is not None
    dims = list(value.shape.dims)
    dims[axis] = int(value.shape[axis]) * times  # pyright: ignore[reportArgumentType]
    value.shape = ir.Shape(dims)
