"""Write an adapter into the branches that the pass `lora` has made, as weights of the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qeff_ir.adapters.fit import Base, fit
from qeff_ir.adapters.folder import check_name, read_adapter
from qeff_ir.arrays import Array
from qeff_ir.errors import PassError
from qeff_ir.ir.baked import name_adapters, names_of
from qeff_ir.ir.module import CHANGED_KEY, WEIGHT_KEY, Module
from qeff_ir.ir.ports import ADAPTER_ROW
from qeff_ir.ir.residents import KINDS, Resident
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AtLeast, Expect

from .merge_lora import adapter_digest


@register
@dataclass(frozen=True, slots=True)
class BakeLora(Pass):
    """Give the next slot of ``lora{mode=slots}`` an adapter for good: the stacked factors become initializers.

    Each use takes one more slot, from 1 on; slot 0 stays the base model's, all zeros, as do slots that no use takes.
    ``lora_ids`` stays an input and selects a row's adapter (AI 100 contract §6.2), so that a host which knows nothing
    of adapter inputs has its adapters. A target writes their numbers beside the package (§14.1).

    ``digest`` (see `passes.merge_lora.adapter_digest`) makes the pass refuse an adapter that has changed since, and
    names its contents in the pipeline.
    """

    name: ClassVar[str] = "bake-lora"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_interface: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True
    expect: ClassVar[Expect] = AtLeast(1)

    adapter: str = field(default="", metadata={"help": "folder of the adapter; it must be given", "path": True})
    called: str = field(default="default", metadata={"help": "name of the adapter"})
    digest: str = field(default="", metadata={"help": "start of the digest that the adapter must have"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Write the adapter.

        Raises:
            PassError: No adapter is named, it has changed, there are no branches with slots, or no slot is free.
            AdapterError: It cannot be read, or does not fit.
        """
        if not self.adapter:
            raise PassError("no adapter is named: give its folder, bake-lora{adapter=FOLDER}")
        folder, ids = Path(self.adapter), module.find(ADAPTER_ROW)
        check_name(self.called)
        if not adapter_digest(folder).startswith(self.digest):
            raise PassError(f"the adapter {folder} has changed since the pipeline was written: write it again")
        stacks = _stacks(module)
        if ids is None or not stacks:
            raise PassError("there are no branches with slots to write into: put lora{mode=slots} before bake-lora")
        names, slots = names_of(ids), min(item.slots for item in stacks)
        if self.called in names or len(names) == slots:
            what = f"there is an adapter '{self.called}' already" if self.called in names else f"all {slots} are taken"
            raise PassError(f"no slot is free for the adapter {folder} ({what}): give another name, or lora a larger n")
        tensors = fit(self.called, read_adapter(folder), stacks, _base(module))
        if not rewriter.rewrite("adapter"):
            return
        for item in stacks:
            value = _initializer(module, item)
            value.const_value = _with(value.const_value, item, len(names) + 1, tensors.get(item.input))
            value.metadata_props[CHANGED_KEY] = rewriter.pass_id
        module.residents = list(module.states)
        name_adapters(ids, [*names, self.called])
        rewriter.sweep()


def _stacks(module: Module) -> list[Resident]:
    """The factors of all slots: those that are inputs still, or those that have become initializers."""
    if module.adapters:
        return [item for item in module.adapters if item.slots]
    found: list[Resident] = []
    for name, value in module.graph.initializers.items():
        for kind in (kind for kind in KINDS.values() if kind.slots):
            end = kind.input.removeprefix("{path}")
            if name.endswith(end) and value.metadata_props.get(WEIGHT_KEY) == name and value.shape is not None:
                sizes = tuple(int(size) for size in value.shape.numpy())
                found.append(Resident(0, kind.name, sizes, ir.DataType.FLOAT, path=name.removesuffix(end)))
    return found


def _base(module: Module) -> Base:
    """The base model's parameters by name, as far as passes have left them their own."""
    known = {value.metadata_props.get(WEIGHT_KEY): value for value in module.graph.initializers.values()}

    def read(name: str) -> Array | None:
        value = known.get(name)
        tensor = value.const_value if value is not None else None
        return None if tensor is None else tensor.numpy().astype(np.float32)

    return read


def _initializer(module: Module, item: Resident) -> ir.Value:
    """The initializer of all slots; an input becomes one, and is returned no more."""
    graph = module.graph
    known = graph.initializers.get(item.input)
    if known is not None:
        return known
    value = module.input(item.input)
    graph.inputs.remove(value)
    for out in [out for out in graph.outputs if out.name == item.output]:
        graph.outputs.remove(out)
    value.const_value = _with(None, item, 0, None)
    value.metadata_props[WEIGHT_KEY] = item.input
    graph.register_initializer(value)
    return value


def _with(before: ir.TensorProtocol | None, item: Resident, slot: int, own: Array | None) -> ir.TensorProtocol:
    """All slots with an adapter in one of them, made when they are written."""
    shape = tuple(int(size) for size in item.shape)

    def make() -> ir.TensorProtocol:
        made = np.zeros(shape, dtype=np.float32) if before is None else before.numpy().copy()
        if own is not None:
            made[slot] = own
        return ir.Tensor(made, name=item.input)

    return ir.LazyTensor(make, item.dtype, ir.Shape(shape), name=item.input)
