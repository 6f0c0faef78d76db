"""Copy key/value heads, so that each of several devices has its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.matching import operand

from ._kv_branches import Branch, branch, head_sizes


@register
@dataclass(frozen=True, slots=True)
class ReplicateKvHeads(Pass):
    """Give each key/value head ``n`` copies (AI 100 contract §3): a device of several then needs no cache but its own.

    Attention answers the same, as the query heads of a group are spread over the copies of its head. The weights of the
    projections are repeated, lazily and as codes where they are quantized; so are biases, norms of all heads, and the
    factors of adapters. Where heads cannot be followed to weights of their own, the new keys or values are copied
    before they are written.

    ``n=auto`` takes the least number of copies, at least two, by which the heads of a layer are shared out evenly: it
    divides ``devices`` by the copies of all heads, and the query heads too. On fewer devices than heads, nothing is
    copied. ``devices`` is what the option ``num_devices`` of the target says, unless it is given.

    A layer in which each query head has a key/value head of its own is left as it is, and so is latent attention (MLA),
    which does not read its caches as they are.

    It stands before `kv-retention` (``+replicate-kv-heads<kv-retention``): adapters fit the layers of the checkpoint.
    """

    name: ClassVar[str] = "replicate-kv-heads"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_interface: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True

    n: Literal["auto"] | int = field(default="auto", metadata={"help": "copies of each head"})
    devices: int = field(default=0, metadata={"help": "devices that share the heads", "compile": "num_devices"})

    def sites(self, module: Module) -> list[ir.Node]:
        """What reads the caches of keys and values; it stays."""
        return [node for attentions in _pairs(module).values() for node in attentions]

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Copy the heads of each pair of caches.

        Raises:
            PassError: ``n`` is less than 2 or fits no layer, or the caches have a layout already.
        """
        if self.n != "auto" and self.n < 2:
            raise PassError(f"n={self.n} copies nothing: give 2 or more, or auto")
        if module.states and "states-lowered" in module.properties:
            raise PassError("the caches have a layout already: write +replicate-kv-heads<kv-retention")
        pairs = {updates: (self._times(updates, found), found) for updates, found in _pairs(module).items()}
        reasons = [times for times, _ in pairs.values() if isinstance(times, str)]
        if self.n != "auto" and len(reasons) == len(pairs):
            reason = next(iter(reasons), "no attention reads the caches as they are; latent attention (MLA) does not")
            raise PassError(f"no head can be copied ({reason}): leave replicate-kv-heads out")
        for updates, (times, attentions) in pairs.items():
            if isinstance(times, str):
                for node in attentions:
                    rewriter.missed(node, times)
                continue
            found = [branch(update) for update in updates]
            rule = "weights" if all(isinstance(item, Branch) for item in found) else "keys or values"
            if rewriter.rewrite(rule, *attentions):
                for update, item in zip(updates, found, strict=True):
                    _replicate(module, rewriter, update, item, times)
        rewriter.sweep()

    def _times(self, updates: tuple[ir.Node, ir.Node], attentions: list[ir.Node]) -> int | str:
        """Copies of each head of a pair of caches, or why there are none."""
        if any(user not in attentions for update in updates for user in update.outputs[0].consumers()):
            return "something else than attention reads the cache"
        sizes = [head_sizes(update) for update in updates]
        queries = [node.inputs[0] for node in attentions]
        counts = {q.shape[1] if q is not None and q.shape is not None else None for q in queries}
        if None in sizes or sizes[0] is None or not all(isinstance(count, int) for count in counts):
            return "the number of heads is not known"
        heads, numbers = sizes[0][0], [count for count in counts if isinstance(count, int)]
        if heads in numbers:
            return "each query head has a key/value head of its own"
        if self.n == "auto":
            return self._least(heads, numbers)
        if any(count % (heads * self.n) for count in numbers):
            return f"{numbers[0]} query heads are not divided by {self.n} times the {heads} key/value heads"
        return self.n

    def _least(self, heads: int, queries: list[int]) -> int | str:
        if self.devices <= heads:
            return f"{max(self.devices, 1)} devices have no more than the {heads} key/value heads"
        for times in range(2, self.devices // heads + 1):
            if self.devices % (heads * times) == 0 and all(count % (heads * times) == 0 for count in queries):
                return times
        return f"no number of copies shares {heads} key/value heads out among {self.devices} devices"


def _pairs(module: Module) -> dict[tuple[ir.Node, ir.Node], list[ir.Node]]:
    """The updates of keys and values, and the attention that reads them."""
    found: dict[tuple[ir.Node, ir.Node], list[ir.Node]] = {}
    for node in module.graph:
        if node.op_type in ("Attention", "SinkAttention"):
            keys, values = (value and value.producer() for value in (operand(node, 1), operand(node, 2)))
            if keys is not None and values is not None and keys.op_type == values.op_type == "CacheUpdate":
                found.setdefault((keys, values), []).append(node)
    return found


def _replicate(module: Module, rewriter: Rewriter, update: ir.Node, found: Branch | str, times: int) -> None:
    """Let an update write copies of its heads, and its state hold them."""
    state = next(s for s in module.states if s.output == update.outputs[0].name)
    heads = int(state.shape[1])
    if isinstance(found, Branch):
        found.replicate(rewriter, times)
    else:
        b = rewriter.at(update)
        update.replace_input_with(1, b("Gather", update.inputs[1], b.const(np.arange(heads).repeat(times)), axis=1))
    wide = (state.shape[0], heads * times, *state.shape[2:])
    module.residents[module.residents.index(state)] = dataclasses.replace(state, shape=wide)
    for value in (module.input(state.input), update.outputs[0]):
        value.shape = ir.Shape(wide)
