"""Add an adapter to the weights for good, when they are written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir.adapters.fit import numbers
from qeff_ir.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, Adapter, Factors, read_adapter
from qeff_ir.adapters.layers import Layer, find_layers, layers_without_weight
from qeff_ir.arrays import Array
from qeff_ir.errors import AdapterError, PassError
from qeff_ir.ir.module import CHANGED_KEY, WEIGHT_KEY, Module
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AtLeast, Expect
from qeff_ir.passing.matching import made_by
from qeff_ir.quantized import quantized


@register
@dataclass(frozen=True, slots=True)
class MergeLora(Pass):
    """Replace the weight of each adapted layer by ``W + scaling * B A``, lazily: nothing is read before it is written.

    A weight that other layers share stays theirs; the adapted layer gets one of its own. ``digest`` (see
    `adapter_digest`) makes the pass refuse an adapter that has changed since, and names its contents in the pipeline.
    """

    name: ClassVar[str] = "merge-lora"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_weights: ClassVar[bool] = True
    expect: ClassVar[Expect] = AtLeast(1)

    adapter: str = field(default="", metadata={"help": "folder of the adapter; it must be given", "path": True})
    digest: str = field(default="", metadata={"help": "start of the digest that the adapter must have"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Replace the weights.

        Raises:
            PassError: The adapter changed, or does not fit the model.
            AdapterError: It cannot be read.
        """
        if not self.adapter:
            raise PassError("no adapter is named: give its folder, merge-lora{adapter=FOLDER}")
        folder = Path(self.adapter)
        adapter = read_adapter(folder)
        if not adapter_digest(folder).startswith(self.digest):
            raise PassError(f"the adapter {folder} has changed since the pipeline was written: write it again")
        layers: dict[str, list[Layer]] = {}
        for layer in find_layers(module):
            layers.setdefault(layer.path, []).append(layer)
        for path, factors in adapter.layers.items():
            if path not in layers:
                lost = path in layers_without_weight(module)
                way = ": put merge-lora before the pass that took its weight" if lost else ""
                raise PassError(f"the adapter {folder} changes {path}, which the model does not have{way}")
            _check(folder, layers[path][0], factors)
            if rewriter.rewrite("weight"):
                if quantized(layers[path][0].weight.const_value) is not None:
                    rewriter.missed(layers[path][0].node, "its weight was of few bits, and is float32 now")
                _merge(layers[path], factors, rewriter)
        _biases(module, adapter, rewriter)
        rewriter.sweep()


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's configuration and weights, in hex."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            digest.update((folder / name).read_bytes() + b"\0")
        except OSError as error:
            raise AdapterError(f"{folder / name} cannot be read ({error.strerror}): save the adapter again") from error
    return digest.hexdigest()


def _check(folder: Path, layer: Layer, factors: Factors) -> None:
    sizes = factors.a.shape[1], factors.b.shape[0]
    if sizes != layer.features:
        raise PassError(
            f"the adapter {folder} is {list(sizes)} for {layer.path}, which is {list(layer.features)}: it is of "
            "another base model"
        )


def _merge(uses: list[Layer], factors: Factors, rewriter: Rewriter) -> None:
    layer = uses[0]
    weight = layer.weight
    tensor = weight.const_value
    assert tensor is not None
    # A matrix product reads its weight directly or transposed; a look-up reads it row by row.
    flipped = layer.transposed

    def merged() -> Array:
        delta = (numbers(factors.b) @ numbers(factors.a)) * np.float32(factors.scaling)
        return (tensor.numpy() + (delta if flipped else delta.T)).astype(tensor.dtype.numpy())

    new = _lazy(tensor, merged)
    readers = [made_by(use.node.inputs[1], "Transpose") or use.node for use in uses]
    if all(user in readers for user in weight.consumers()) and not _shared_transpose(readers, uses):
        weight.const_value = new
        weight.metadata_props[CHANGED_KEY] = "merge-lora"
        return
    own = ir.Value(name=f"{layer.path}.merged.weight", shape=weight.shape, type=weight.type, const_value=new)
    own.metadata_props.update({**weight.metadata_props, WEIGHT_KEY: f"{layer.path}.weight", CHANGED_KEY: "merge-lora"})
    rewriter.graph.register_initializer(own)
    for use in uses:
        index = 0 if layer.kind == "embedding" else 1
        transpose = made_by(use.node.inputs[index], "Transpose")
        read = own
        if transpose is not None:
            read = rewriter.at(use.node)("Transpose", own, perm=[1, 0])
        use.node.replace_input_with(index, read)


def _shared_transpose(readers: list[ir.Node], uses: list[Layer]) -> bool:
    """Whether another layer reads the weight through the same transposition."""
    ours = {use.node for use in uses}
    return any(r not in ours and not set(r.outputs[0].consumers()) <= ours for r in readers)


def _biases(module: Module, adapter: Adapter, rewriter: Rewriter) -> None:
    known = {v.metadata_props.get(WEIGHT_KEY, ""): v for v in module.graph.initializers.values()}
    for path, entry in adapter.biases.items():
        _replace(known, path, rewriter, lambda _old, entry=entry: numbers(entry))
    for path, factors in adapter.layers.items():
        if factors.b_bias is not None:
            extra = factors.b_bias
            _replace(known, path, rewriter, lambda old, f=factors, e=extra: old + numbers(e) * np.float32(f.scaling))


def _replace(known: dict[str, ir.Value], path: str, rewriter: Rewriter, change: Callable[[Array], Array]) -> None:
    value = known.get(f"{path}.bias")
    if value is None or value.const_value is None:
        raise PassError(f"the adapter has a bias for {path}, which has none to merge it into: keep it as an adapter")
    tensor = value.const_value
    if rewriter.rewrite("bias"):
        value.const_value = _lazy(tensor, lambda: change(tensor.numpy()).astype(tensor.dtype.numpy()))
        value.metadata_props[CHANGED_KEY] = "merge-lora"


def _lazy(old: ir.TensorProtocol, compute: Callable[[], Array]) -> ir.LazyTensor:
    shape = ir.Shape(old.shape.numpy())
    return ir.LazyTensor(lambda: ir.tensor(compute(), name=old.name), old.dtype, shape, name=old.name)
