"""Short contexts read a part of the caches only: a specialization for each length (AI 100 contract §1.1 and §3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import READ_LENGTH, name_of
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import AllSites, Expect
from qeff_ir.passing.options import whole_numbers
from qeff_ir.passing.shapes import carry_on

_LENGTH = name_of(READ_LENGTH)


@register
@dataclass(frozen=True, slots=True)
class ComputeContextLength(Pass):
    """Read as many slots of each cache as ``comp_ctx_lengths`` is long; a run takes the shortest that it fits.

    ``prefill`` and ``decode`` are the lengths in these phases, with commas; lengths beyond the context become the
    context. Where the longest is shorter than the context, no run of the phase reaches beyond it.

    What is read, where it is hidden, and the masks are all made of one length, and follow it. On the AI 100, the pass
    stands behind ``kv-retention`` and before ``attention``. On ONNX Runtime, it stands behind ``ort-attention``, whose
    kernel reads a cache as far as it is filled: what that leaves reads a slice.

    Rings are read whole; a model without another cache that is read to its end gets no input.
    """

    name: ClassVar[str] = "compute-context-length"
    phase: ClassVar[Phase] = Phase.LOWER
    requires: ClassVar[frozenset[str]] = frozenset({"states-lowered"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = AllSites()

    prefill: int | str = field(default=1024, metadata={"help": "lengths in prefill, with commas"})
    decode: int | str = field(default=1024, metadata={"help": "lengths in decode, with commas"})

    def sites(self, module: Module) -> list[ir.Node]:
        """What asks for the length of a cache that keeps every token, but in order to write it."""
        return list(dict.fromkeys(node for length in _lengths(module) for node in length.consumers() if _reads(node)))

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Let the length of the input take the place of that of the caches.

        Raises:
            PassError: A length is no whole number, or the module has no specializations.
        """
        lengths = {"prefill": whole_numbers(self.prefill, "prefill"), "decode": whole_numbers(self.decode, "decode")}
        sites = self.sites(module)
        if not sites or not rewriter.rewrite("length"):
            return
        if not module.specializations:
            raise PassError("a specialization is split by its lengths: set the module's specializations before")
        given = ir.val(_LENGTH, shape=ir.Shape([_LENGTH]), dtype=ir.DataType.INT64)
        module.add_input(given, READ_LENGTH)
        module.dims[_LENGTH] = Dim(_LENGTH)
        b = rewriter.at(next(iter(module.graph)))
        length = b("Shape", given, start=0, end=1, shape=[1], dtype=ir.DataType.INT64)
        of_caches = _lengths(module)
        for node in sites:
            for index, value in enumerate(node.inputs):
                if value in of_caches:
                    node.replace_input_with(index, length)
        for state in _whole(module):
            _read_in_part(module, state, length, rewriter)
        for node in module.graph:
            if node.op_type == "Unsqueeze" and _is_row(node):  # of slots, which masks are made of
                for old in {state.ctx_dim for state in _whole(module)}:
                    _shorten(module, node.outputs[0], old)
        rewriter.sweep()
        room = max(s.symbols["ctx_len"] for s in module.specializations)
        within = {phase: sorted({min(length, room) for length in found}) for phase, found in lengths.items()}
        module.split(_LENGTH, {"prefill": within["prefill"], "decode": within["decode"]})


def _read_in_part(module: Module, state: Resident, length: ir.Value, rewriter: Rewriter) -> None:
    """Let all that reads a cache see its first slots: what gathers them does by now, all else reads a slice."""
    kept = module.output(state.output)
    readers = [(node, index) for node, index in kept.uses() if node.op_type != "Shape"]
    gathers = [node for node, _ in readers if node.op_type.startswith("CtxGather")]
    for node in gathers:
        _shorten(module, node.outputs[0], state.ctx_dim)
    if gathers or not readers:
        return
    update = kept.producer()
    assert update is not None
    b = rewriter.after(update)
    part = b("Slice", kept, b.const([0]), length, b.const([2]), shape=state.shape, dtype=kept.dtype)
    for node, index in readers:
        node.replace_input_with(index, part)
    _shorten(module, part, state.ctx_dim)


def _shorten(module: Module, value: ir.Value, old: str | int) -> None:
    """Give a value, and all that is made of it, the new length in the place of the cache's."""
    if value.shape is not None and old in value.shape.dims:
        value.shape = ir.Shape([_LENGTH if d == old else d for d in value.shape.dims])
        carry_on(module.graph, value, old, _LENGTH)


def _lengths(module: Module) -> list[ir.Value]:
    """The lengths of caches that keep every token, ``[1]``, as the graph asks for them."""
    sizes = [node for node in module.graph if node.op_type == "Shape" and _is_cache(module, node.inputs[0])]
    return [node.outputs[0] for node in sizes if node.attributes.get_int("start", 0) == 2]


def _reads(node: ir.Node) -> bool:
    """Whether what a node makes of a length does not tell where a cache is written."""
    queue, seen = [node], {node}
    for at in queue:
        for user, _ in at.outputs[0].uses():
            if user.op_type in ("TensorScatter", "GroupQueryAttention"):
                return False
            if user not in seen and user.outputs[0].dtype in (ir.DataType.INT32, ir.DataType.INT64):
                seen.add(user)
                queue.append(user)
    return True


def _whole(module: Module) -> list[Resident]:
    """The caches that keep every token."""
    return [state for state in module.states if state.has_slots and not state.ring]


def _is_cache(module: Module, value: ir.Value | None) -> bool:
    """Whether a value is a cache that keeps every token, or rows of one."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return False
    dim = value.shape[2]
    return (dim if isinstance(dim, int) else dim.value) in {state.ctx_dim for state in _whole(module)}


def _is_row(node: ir.Node) -> bool:
    source = node.inputs[0]
    maker = source.producer() if source is not None else None
    return maker is not None and maker.op_type == "Range"
