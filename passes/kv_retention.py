"""Give the key/value caches the physical form that a target keeps between runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir import dialect, operators
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import POSITIONS
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import Pass, Phase, Rewriter, register, registered_passes
from qeff_ir.passing.expect import AllSites, Expect
from qeff_ir.passing.matching import depends_on, operand
from qeff_ir.passing.options import nearest
from qeff_ir.passing.shapes import carry_on

from .kv_layouts import LAYOUTS, Layout, Slots


@register
@dataclass(frozen=True, slots=True)
class KVRetention(Pass):
    """Lower cache writes and slot positions to a physical layout.

    ``layout=scatter`` is the AI 100 form: `CtxScatter` drops padded tokens, `CtxGather` reads only slots that hold a
    token. ``layout=tensor-scatter`` is the in-place form for ONNX Runtime: the standard `TensorScatter`, whose input
    and output share a buffer.

    ``ring=auto`` keeps only as many slots of a sliding-window layer as the window and one prefill chunk need
    (``window + prefill_seq_len - 1``), where this is shorter than the context; ``ring=off`` never does.

    Establishes ``<layout>-layout`` too (``scatter-layout``), which a pass that works on one layout requires.

    Needs: specializations, and every mask that limits a windowed layer computed from that layer's slot positions.
    """

    name: ClassVar[str] = "kv-retention"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = AllSites()

    layout: str = field(default="scatter", metadata={"help": "physical form", "choices": LAYOUTS})
    ring: Literal["auto", "off"] = field(
        default="auto", metadata={"help": "whether sliding-window layers reuse their slots"}
    )

    def established(self) -> frozenset[str]:
        """Which layout it is too: ``scatter-layout``, say."""
        return self.establishes | {f"{self.layout}-layout"}

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Choose the rings, size the states, lower every write and every slot-position node.

        Raises:
            PassError: The module has no specializations, a cache is written twice, or all have another layout already.
        """
        if not module.specializations:
            raise PassError("kv-retention sizes the caches: set the module's specializations before it")
        if not self.sites(module):  # no cache, or all are lowered: their sizes must not grow again
            other = next((n for n in LAYOUTS if n != self.layout and f"{n}-layout" in module.properties), None)
            if other is not None and module.states:
                raise PassError(f"the caches have the layout {other} already: lower the model again for {self.layout}")
            return
        for window in sorted({s.window for s in module.states if s.window is not None}):
            if self.ring == "auto" and _ring_fits(module, window):
                _make_ring(module, window)
        first = next(iter(module.graph))
        anchor = ir.node("Identity", [module.port(POSITIONS)])  # keeps the front when `first` is replaced
        anchor.metadata_props.update(first.metadata_props)
        module.graph.insert_before(first, anchor)
        layout = self._layout(module, rewriter)
        states = {s.input: s for s in module.states}
        for node in self.sites(module):
            past = node.inputs[0]
            state = states.get(past.name or "") if past is not None else None
            if past is None or state is None:
                rewriter.missed(node, "it does not read a state of the module")
                continue
            slots = Slots(state.ctx_dim, state.ring, past)
            if node.op_type == "CachePositions":
                positions = layout.positions(node, slots)
                if rewriter.replace(node, positions):
                    carry_on(module.graph, positions, state.ctx_dim, state.ctx_dim)
            elif rewriter.rewrite(f"{layout.op_type} ring" if slots.ring else layout.op_type):
                layout.write(node, slots, state)
        layout.finish()
        module.graph.remove(anchor, safe=True)
        operators.attach(module.model)

    def _layout(self, module: Module, rewriter: Rewriter) -> Layout:
        registered_passes()  # imports the targets' passes, and their layouts with them
        if self.layout not in LAYOUTS:
            raise PassError(f"there is no layout '{self.layout}'; {nearest(self.layout, LAYOUTS)}")
        return LAYOUTS[self.layout](module, rewriter)

    def sites(self, module: Module) -> list[ir.Node]:
        """Every op of the dialect that writes a cache or looks at its slots."""
        ops = "CacheUpdate", "CachePositions"
        return [node for node in module.graph if node.domain == dialect.DOMAIN and node.op_type in ops]


def _ring_length(module: Module, window: int) -> int:
    """Slots that a window needs: the tokens that the first query of a chunk sees, and the rest of the chunk."""
    longest = max(s.symbols["seq_len"] for s in module.specializations)
    return window + longest - 1


def _ring_fits(module: Module, window: int) -> bool:
    """Whether a ring is shorter than the context and hides nothing that a query may see."""
    ctx_len = max(s.symbols["ctx_len"] for s in module.specializations)
    if _ring_length(module, window) >= ctx_len:
        return False
    ours = {module.input(s.input) for s in module.states if s.window == window}
    positions = {n.outputs[0]: n.inputs[0] for n in module.graph if n.op_type == "CachePositions"}
    others = {out for out, past in positions.items() if past not in ours}
    right = {out for out, past in positions.items() if past in ours}
    for state in module.states:
        if state.window != window:
            continue
        for node in module.output(state.output).consumers():
            attention = node.op_type in ("Attention", "SinkAttention")
            mask = operand(node, 3) if attention else None
            if mask is None or not depends_on(mask, right) or depends_on(mask, others):
                return False
    return True


def _make_ring(module: Module, window: int) -> None:
    """Turn the states of one window into rings with a length symbol of their own."""
    windows = {s.window for s in module.states if s.window is not None}
    symbol = "sliding_window" if len(windows) == 1 else f"sliding_window_{window}"
    length = _ring_length(module, window)
    new: list[Resident] = []
    ours = {module.input(s.input) for s in module.states if s.window == window}
    for node in module.graph:
        if node.domain == dialect.DOMAIN and node.inputs and node.inputs[0] in ours:
            node.attributes["ring"] = ir.AttrInt64("ring", 1)  # so that the ops mean a ring until they are lowered
            if node.op_type == "CachePositions":
                (out,) = node.outputs
                out.shape = ir.Shape([*(out.shape or ("batch_size",))[:1], symbol])
                carry_on(module.graph, out, "ctx_len", symbol)
    for state in module.residents:
        if state.window == window:
            state = dataclasses.replace(
                state, ring=True, shape=tuple(symbol if d == "ctx_len" else d for d in state.shape)
            )
            for value in (module.input(state.input), module.output(state.output)):
                value.shape = ir.Shape(state.shape)
        new.append(state)
    module.residents = new
    module.dims[symbol] = Dim(symbol)
    module.set_size(symbol, length)
