"""Copies of layers: the graph of a model cut to one layer of each kind becomes that of the whole model.

A copy has the nodes of the layer that it is a copy of, with the weights and the states of its own place. Constants that
a layer makes are the same in all copies, and stay one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import onnx_ir as ir

from qeff_ir.errors import ModelLoadError
from qeff_ir.frontend.layers.kinds import INPUT, OUTPUT, Fold
from qeff_ir.ir.module import SOURCE_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.residents import Resident

Tensors = Mapping[str, ir.TensorProtocol]


@dataclasses.dataclass
class Layer:
    """A traced layer.

    Attributes:
        start: The mark where the hidden states enter.
        end: The mark where they leave.
        last: The last node of the layer, in graph order.
        nodes: The nodes that compute anything but constants, in order, and those that read the sizes of its states.
        states: The states that these read.
    """

    start: ir.Node
    end: ir.Node
    last: ir.Node
    nodes: list[ir.Node]
    states: list[Resident]


def cut_weights(weights: Tensors, fold: Fold) -> dict[str, ir.TensorProtocol]:
    """The weights under the names that they have in the cut model."""
    pattern = re.compile(re.escape(fold.path) + r"\.(\d+)\.(.*)", re.DOTALL)
    found: dict[str, ir.TensorProtocol] = {}
    for name, tensor in weights.items():
        match = pattern.fullmatch(name)
        if match is None:
            found[name] = tensor
        elif int(match[1]) in fold.traced:
            found[f"{fold.path}.{fold.traced.index(int(match[1]))}.{match[2]}"] = tensor
    return found


def find_layers(module: Module, fold: Fold, tensors: Tensors) -> list[Layer] | None:
    """The traced layers of a module, or `None` when its graph is not a chain of them.

    Args:
        module: Lowered from the model under `layers.cut` and `layers.marked`; layers are named by their place in the
            cut model, states by their layer in the whole one.
        fold: What was traced.
        tensors: Parameters and buffers of the whole model by name; what has no name there is a constant.
    """
    graph, count = module.graph, len(fold.traced)
    starts = [n for n in graph if n.op_type == INPUT]
    ends = [n for n in graph if n.op_type == OUTPUT]
    if len(starts) != count or len(ends) != count:
        return None
    place = _Places(fold)
    home: dict[ir.Value, int] = {}  # what is a layer's own: its weights, and all that it makes
    for index, node in enumerate(starts):
        home[node.outputs[0]] = index
    for name, value in graph.initializers.items():
        owner = place.of(name)
        if owner is not None and _moved(name, fold, owner, fold.traced[owner]) in tensors:
            home[value] = owner
    inputs = {module.input(s.input): s for s in module.states}
    owners = {node: place.of(node.metadata_props.get(SOURCE_KEY, "")) for node in graph}
    users: dict[ir.Value, set[int]] = {v: {o for n, _ in v.uses() if (o := owners.get(n)) is not None} for v in inputs}
    found = [Layer(start, end, end, [], []) for start, end in zip(starts, ends, strict=True)]
    computed = set(graph.inputs)  # what is not constant
    sizes: dict[ir.Value, int] = {}  # outside of layers, but computed from the states of one
    for node in graph:
        reads = {home[v] for v in node.inputs if v in home}
        if node in starts:
            # From the end of the layer before, or from what comes before all of them.
            index = starts.index(node)
            if reads or (index and node.inputs[0] is not ends[index - 1].outputs[0]):
                return None
            continue
        if node in ends:
            if reads != {ends.index(node)}:
                return None
            continue
        owner = owners[node]
        if owner is not None:
            found[owner].last = node
        if reads - {owner}:
            return None
        if not reads and not any(v in computed for v in node.inputs):
            continue
        computed.update(node.outputs)
        taken = [inputs[v] for v in node.inputs if v in inputs]
        if owner is None:
            of = {i for v in node.inputs if v in users for i in users[v]} | {
                sizes[v] for v in node.inputs if v in sizes
            }
            if len(of) == 1 and node.outputs[0].dtype in (None, ir.DataType.INT64):
                (index,) = of
                sizes |= dict.fromkeys(node.outputs, index)
                found[index].nodes.append(node)
            continue
        if _has_subgraph(node):
            return None
        found[owner].nodes.append(node)
        found[owner].states += [s for s in taken if s not in found[owner].states]
        if reads or taken:
            home |= dict.fromkeys(node.outputs, owner)
    order = {node: index for index, node in enumerate(graph)}
    for index, layer in enumerate(found):
        layer.last = max(layer.last, layer.end, key=order.__getitem__)
        layer.nodes = _used(layer.nodes, owners, index)
        layer.states.sort(key=module.states.index)
        results = {home.get(module.output(s.output)) for s in layer.states}
        after = {u.node for u in layer.end.outputs[0].uses()}
        if results - {index} or (index + 1 < count and after != {starts[index + 1]}):
            return None
    taken = [s for layer in found for s in layer.states]
    return found if len(taken) == len(module.states) and set(taken) == set(module.states) else None


def _used(nodes: list[ir.Node], owners: Mapping[ir.Node, int | None], place: int) -> list[ir.Node]:
    """Without the sizes that others read too: all layers share those."""
    kept: set[ir.Node] = set()
    for node in reversed(nodes):
        users = [user for v in node.outputs for user, _ in v.uses()]
        if owners[node] == place or (users and all(user in kept for user in users)):
            kept.add(node)
    return [node for node in nodes if node in kept]


def unfold(module: Module, fold: Fold, layers: list[Layer], tensors: Tensors) -> None:
    """Give a module of a cut and marked model all layers of the whole one, in place.

    Args:
        module: See `find_layers`.
        fold: What was traced.
        layers: What `find_layers` found.
        tensors: Parameters and buffers of the whole model by name.

    Raises:
        ModelLoadError: A copy needs a weight that there is none of.
    """
    _rename(module, fold)
    graph = module.graph
    ends = {s: (module.input(s.input), module.output(s.output)) for s in module.states}
    hidden, after = layers[0].start.inputs[0], layers[0].last
    enters: list[ir.Value] = []
    for index, place in enumerate(fold.kinds):
        layer, shift = layers[place], index - fold.traced[place]
        assert hidden is not None
        if shift == 0:  # the traced layer itself; its copies read its constants, and stand behind it
            enters.append(hidden)
            hidden, after = layer.end.inputs[0], layer.last
            continue
        copier = _Copier(fold, place, index, tensors, {layer.start.outputs[0]: hidden})
        moved = [dataclasses.replace(s, layer=s.layer + shift) for s in layer.states]
        for old, new in zip(layer.states, moved, strict=True):
            copier.values[ends[old][0]] = copier.value(ends[old][0], new.input)
        copies = [copier.node(node) for node in layer.nodes]
        graph.insert_after(after, copies)
        for value in copier.weights:
            graph.register_initializer(value)
        for old, new in zip(layer.states, moved, strict=True):
            ends[new] = copier.values[ends[old][0]], copier.values[ends[old][1]]
        assert layer.end.inputs[0] is not None
        hidden, after = copier.values[layer.end.inputs[0]], copies[-1]
    assert hidden is not None
    layers[-1].end.outputs[0].replace_all_uses_with(hidden)
    for layer, value in zip(layers, enters, strict=True):
        layer.start.outputs[0].replace_all_uses_with(value)
    graph.remove([n for layer in layers for n in (layer.start, layer.end)], safe=True)
    _replace_interface(module, ends)


def _rename(module: Module, fold: Fold) -> None:
    """Call the layers of the cut model by their place in the whole one."""
    places = _Places(fold)
    for node in module.graph:
        source = node.metadata_props.get(SOURCE_KEY, "")
        if (place := places.of(source)) is not None:
            node.metadata_props[SOURCE_KEY] = _moved(source, fold, place, fold.traced[place])
    owned = [(place, v) for v in module.graph.initializers.values() if (place := places.of(v.name or "")) is not None]
    for _, value in owned:
        del module.graph.initializers[value.name or ""]
    for place, value in owned:
        value.name = _moved(value.name or "", fold, place, fold.traced[place])
        if WEIGHT_KEY in value.metadata_props:
            value.metadata_props[WEIGHT_KEY] = value.name
        module.graph.register_initializer(value)


def _moved(name: str, fold: Fold, old: int, new: int) -> str:
    """The name of the same thing in another layer."""
    return f"{fold.path}.{new}" + name.removeprefix(f"{fold.path}.{old}")


def _replace_interface(module: Module, ends: Mapping[Resident, tuple[ir.Value, ir.Value]]) -> None:
    """Let `ends` be the states of the module, in the order of layers."""
    graph = module.graph
    ours = {name for s in module.states for name in (s.input, s.output)}
    module.residents = sorted(ends, key=lambda s: s.order)
    pairs = [ends[s] for s in module.states]
    graph.inputs[:] = [*(v for v in graph.inputs if v.name not in ours), *(taken for taken, _ in pairs)]
    graph.outputs[:] = [*(v for v in graph.outputs if v.name not in ours), *(result for _, result in pairs)]
    for state, (taken, result) in zip(module.states, pairs, strict=True):
        taken.name, result.name = state.input, state.output


class _Places:
    """Tells the place in the layer list from a name that begins with it."""

    def __init__(self, fold: Fold) -> None:
        self._pattern = re.compile(re.escape(fold.path) + r"\.(\d+)(\.|$)")

    def of(self, name: str) -> int | None:
        """Place of the layer that a module path or a weight is of."""
        match = self._pattern.match(name)
        return int(match[1]) if match is not None else None


class _Copier:
    """Makes one copy of a layer.

    Attributes:
        values: What stands for each value of the traced layer.
        weights: The initializers made for the copy.
    """

    def __init__(self, fold: Fold, place: int, index: int, tensors: Tensors, values: dict[ir.Value, ir.Value]) -> None:
        self._fold, self._old, self._index = fold, fold.traced[place], index
        self._tensors = tensors
        self.values = values
        self.weights: list[ir.Value] = []

    def node(self, node: ir.Node) -> ir.Node:
        """The copy's node."""
        outputs = [self.value(v, f"{v.name}.{self._index}") for v in node.outputs]
        self.values |= dict(zip(node.outputs, outputs, strict=True))
        return ir.Node(
            node.domain,
            node.op_type,
            [self._input(v) for v in node.inputs],
            node.attributes,
            overload=node.overload,
            outputs=outputs,
            version=node.version,
            name=f"{node.name}.{self._index}" if node.name else None,
            metadata_props={**node.metadata_props, SOURCE_KEY: self._source(node)},
        )

    def value(self, value: ir.Value, name: str) -> ir.Value:
        """A value of the same type and shape under another name."""
        shape = None if value.shape is None else ir.Shape(value.shape.dims)
        kind = value.type
        return ir.Value(
            name=name, shape=shape, type=ir.TensorType(kind.dtype) if isinstance(kind, ir.TensorType) else kind
        )

    def _input(self, value: ir.Value | None) -> ir.Value | None:
        if value is None or value in self.values:
            return None if value is None else self.values[value]
        name = value.name or ""
        if not value.is_initializer() or not name.startswith(f"{self._fold.path}.{self._old}."):
            return value
        if name not in self._tensors:
            return value  # a constant that the layer's code makes: the same in all copies, or they would not be alike
        renamed = self._renamed(name)
        if renamed not in self._tensors:
            raise ModelLoadError(f"the checkpoint has no tensor for '{renamed}', which the traced model uses")
        made = self.value(value, renamed)
        made.const_value = self._tensors[renamed]
        made.metadata_props.update(value.metadata_props)
        if WEIGHT_KEY in value.metadata_props:
            made.metadata_props[WEIGHT_KEY] = renamed
        self.values[value] = made
        self.weights.append(made)
        return made

    def _source(self, node: ir.Node) -> str:
        """Where the copy is from; what reads sizes is from outside of layers."""
        source = node.metadata_props[SOURCE_KEY]
        return self._renamed(source) if source.startswith(f"{self._fold.path}.") else source

    def _renamed(self, name: str) -> str:
        return _moved(name, self._fold, self._old, self._index)


def _has_subgraph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
