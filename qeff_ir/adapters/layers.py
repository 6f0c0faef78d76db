"""The layers of a graph that an adapter can change, by the names that PEFT gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qeff_ir.ir import dialect
from qeff_ir.ir.module import LAYER_KEY, PARTS_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.ports import LOGITS, PIXELS
from qeff_ir.ir.sources import sources_of
from qeff_ir.passing.matching import made_by
from qeff_ir.passing.weights import stored, weights_beside

Kind = Literal["linear", "embedding", "parameter"]


@dataclass(frozen=True)
class Layer:
    """One use of a linear or embedding layer.

    Attributes:
        path: Of the Hugging Face module, which is PEFT's name for it.
        kind: What the layer is; a ``parameter`` is a product inside of another kind of module.
        node: The matrix product, without the bias; or the look-up.
        weight: The stored weight.
        features: ``(in, out)``; of an embedding, the size of the vocabulary and the width.
        transposed: Whether the weight is stored ``[out, in]``.
    """

    path: str
    kind: Kind
    node: ir.Node
    weight: ir.Value
    features: tuple[int, int]
    transposed: bool


def find_layers(module: Module) -> list[Layer]:
    """Every linear and embedding layer, in the order of the graph.

    A layer counts by where its node comes from, so the two users of a tied weight are two layers.
    """
    return [layer for node in module.graph if (layer := _layer(node)) is not None]


def encoder_nodes(module: Module) -> set[ir.Node]:
    """The nodes of an encoder of pictures in a language model's graph, whose rows are not those of the batch."""
    found = set[ir.Node]()
    waiting = [value for value in module.graph.inputs if module.role_of(value) is PIXELS]
    while waiting:
        for node in waiting.pop().consumers():
            if node not in found and (node.domain, node.op_type) != (dialect.DOMAIN, "MergeRows"):
                found.add(node)
                waiting += node.outputs
    return found


def layers_without_weight(module: Module) -> dict[str, ir.Node]:
    """Layers that no adapter can change any more, as a pass has made their weight one with others, or repeated it.

    Returns:
        The matrix product that stands for each, by path.
    """
    found: dict[str, ir.Node] = {}
    for node in module.graph:
        weight = stored(node)
        if weights_beside(node) or (weight is not None and _is_derived_layer(weight.value)):
            found |= dict.fromkeys(sources_of(node), node)
    return found


def _is_derived_layer(weight: ir.Value) -> bool:
    """Whether a pass computed a weight from those of layers; experts, say, are parameters of another kind of name."""
    names = weight.metadata_props.get(PARTS_KEY, "").split(",")
    return LAYER_KEY not in weight.metadata_props and all(name.endswith(".weight") for name in names)


def output_layer(module: Module, layers: Iterable[Layer]) -> str | None:
    """Path of the layer that makes the logits."""
    products = {layer.node: layer.path for layer in layers}
    value: ir.Value | None = module.port(LOGITS)
    while value is not None and (node := value.producer()) is not None:
        if node in products:
            return products[node]
        value = next((v for v in node.inputs if v is not None and not v.is_initializer()), None)
    return None


def bias_name(value: ir.Value | None) -> str | None:
    """The module whose ``bias`` a value is, or `None`."""
    name = value.metadata_props.get(WEIGHT_KEY, "") if value is not None and value.is_initializer() else ""
    owner, _, own = name.rpartition(".")
    return owner if own == "bias" else None


def _layer(node: ir.Node) -> Layer | None:
    paths = sources_of(node)
    if node.domain != "" or len(paths) != 1:
        return None
    (path,) = paths
    if node.op_type == "Gather":
        weight = node.inputs[0]
        axis = node.attributes.get("axis")
        if axis is not None and axis.as_int() != 0:
            return None
        return _made(path, "embedding", node, weight, transposed=False)
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    transpose = made_by(node.inputs[1], "Transpose")
    weight = node.inputs[1] if transpose is None else transpose.inputs[0]
    flipped = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return _made(path, "linear", node, weight, transposed=(transpose is not None) != flipped)


def _made(path: str, kind: Kind, node: ir.Node, weight: ir.Value | None, *, transposed: bool) -> Layer | None:
    if weight is None or not weight.is_initializer() or LAYER_KEY not in weight.metadata_props or weight.shape is None:
        return None
    sizes = weight.shape.numpy()
    if len(sizes) != 2:
        return None
    if weight.metadata_props[LAYER_KEY] == "parameter":
        kind = "parameter"
    features = (int(sizes[1]), int(sizes[0])) if transposed else (int(sizes[0]), int(sizes[1]))
    return Layer(path, kind, node, weight, features, transposed)
