"""Read and write the rows of the caches that a run names, by the operators that the AI 100 has for it (contract §2)."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from backends.ai100.row_operators import CTX_DOMAIN
from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import CACHE_ROWS, POSITIONS
from qeff_ir.ir.residents import Resident
from qeff_ir.passing.base import Rewriter

DROPPED = 2**31 - 1
"""Index that the AI 100 neither writes nor reads (contract §2.2)."""


_READS = {"CtxGather": "CtxGatherCB", "CtxGatherBlockedKV": "CtxGatherBlockedKVCB"}
"""What reads the slots of a cache whose rows are those of a run, and what reads them in rows that a run names."""


def index_rows(module: Module, rewriter: Rewriter, rows: ir.Value) -> None:
    """Give every state the rows of the caches, of which a run reads and writes `rows`, int64 ``[batch, 1]``.

    Raises:
        PassError: Something else than an operator for it reads the slots of a cache.
    """
    whole = _WholeStates(rewriter, rows)
    states: list[Resident] = []
    for state in module.states:
        past, result = module.input(state.input), module.output(state.output)
        for node in [node for value in (past, result) for node in value.consumers() if node.op_type == "Shape"]:
            _size(node, module.port(POSITIONS), rewriter)
        wide = (CACHE_ROWS, *state.shape[1:])
        kept = _slots(past, result, rows, rewriter) if state.has_slots else whole.index(past, result, state)
        past.shape, kept.shape = ir.Shape(wide), ir.Shape(wide)
        states.append(dataclasses.replace(state, shape=wide))
    module.residents = [*states, *module.adapters]


def _size(node: ir.Node, positions: ir.Value, rewriter: Rewriter) -> None:
    """Let a node that asks for the rows of a run ask something else than a cache: its positions, ``[batch, seq]``."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    if start > 0:
        return
    b = rewriter.at(node)
    rows = b("Shape", positions, start=0, end=1)
    if end == 1:
        rewriter.substitute(node, rows)
        return
    cache = node.inputs[0]
    others = b("Shape", cache, start=1) if end is None else b("Shape", cache, start=1, end=end)
    rewriter.substitute(node, b("Concat", rows, others, axis=0))


def _slots(past: ir.Value, result: ir.Value, rows: ir.Value, rewriter: Rewriter) -> ir.Value:
    """A cache with an entry for each token: `CtxScatterCB`, and `CtxGatherCB` wherever a layer reads."""
    update = result.producer()
    readers = [node for value in (past, result) for node in value.consumers() if node is not update]
    strange = next((node for node in readers if node.op_type not in (*_READS, "Shape")), None)
    if update is None or update.op_type != "CtxScatter" or strange is not None:
        name = "nothing" if update is None else (strange or update).op_type
        raise PassError(f"{name} uses the cache {past.name} in another form than CtxScatter and CtxGather")
    _, written, tokens = update.inputs
    kept = rewriter.at(update)("CtxScatterCB", past, rows, written, tokens, domain=CTX_DOMAIN, dtype=past.dtype)
    kept.shape = result.shape  # until all that looks at it is done
    rewriter.substitute(update, kept)
    for node in [node for node in readers if node.op_type in _READS]:
        b, (data, slots, *count), like = rewriter.at(node), node.inputs, node.outputs[0]
        if not count:  # that of a block has an index for each head
            slots = b("Slice", slots, b.const([0]), b.const([1]), b.const([1]))
        read = b(_READS[node.op_type], data, rows, slots, *count, domain=CTX_DOMAIN, shape=like.shape, dtype=like.dtype)
        rewriter.substitute(node, read)
    return kept


class _WholeStates:
    """States that a run replaces as a whole: all n entries of a row are read, and written.

    They are ``[rows, n, width]`` or ``[rows, heads, n, width]`` (contract §1.6).
    """

    def __init__(self, rewriter: Rewriter, rows: ir.Value) -> None:
        self.rewriter, self.rows = rewriter, rows
        self._entries: dict[int, ir.Value] = {}
        self.b = rewriter.at(next(iter(rewriter.graph)))  # before all that looks at the states

    def index(self, past: ir.Value, result: ir.Value, state: Resident) -> ir.Value:
        """Select the rows before a state is looked at, and put them back; returns what is retained."""
        ending = "3D" if len(state.shape) == 3 else ""  # without heads
        size = int(state.shape[1 if ending else 2])
        users, update = list(past.uses()), result.producer()
        assert update is not None
        entries = self._all(size)
        where = [entries] if ending else [self.b("Unsqueeze", entries, self.b.const([1])), self.b.const(size)]
        own = self.b(
            f"CtxGatherCB{ending}", past, self.rows, *where, domain=CTX_DOMAIN, shape=past.shape, dtype=past.dtype
        )
        for node, at in users:
            node.replace_input_with(at, own)
        kept = self.rewriter.after(update)(
            f"CtxScatterCB{ending}", past, self.rows, entries, result, domain=CTX_DOMAIN, dtype=past.dtype
        )
        name, result.name = result.name, f"{past.name}.of_run"
        outputs = self.rewriter.graph.outputs
        outputs[list(outputs).index(result)] = kept
        kept.name = name
        return kept

    def _all(self, size: int) -> ir.Value:
        """The entries of each row of a run, ``[batch, size]``, `DROPPED` for a row that continues none."""
        if size not in self._entries:
            b = self.b
            every = b("Range", b.const(0), b.const(size), b.const(1), shape=[size], dtype=ir.DataType.INT64)
            idle = b("Less", self.rows, b.const(0))
            self._entries[size] = b("Where", idle, b.const(DROPPED), every)
        return self._entries[size]
