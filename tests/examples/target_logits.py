"""A pass whose input tells by its length how many logits a run returns, to verify drafts (contract §1.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import KEPT_LOGITS, POSITIONS, name_of
from qeff_ir.ir.residents import KINDS
from qeff_ir.passing import Exactly, Expect, Pass, Phase, Rewriter
from qeff_ir.passing.selection import head_of, keep_columns


@dataclass(frozen=True, slots=True)
class TargetLogits(Pass):
    """Return the logits of the last tokens, as many as ``num_logits_to_keep`` is long: 1 in prefill, ``k`` in decode.

    A decode run takes ``k`` tokens, one that is certain and a draft of the others; a draft that is rejected is
    overwritten by the next run. It takes the place of ``last-logits``, before the caches are sized. A state that
    cannot go back keeps a model from verifying: its decode runs stay at one token. A `k` that is the length of a
    prefill run is refused.
    """

    name: ClassVar[str] = "target-logits"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = Exactly("num_decoders")

    k: int = dataclasses.field(default=3, metadata={"help": "tokens of a decode run"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Select the last columns before the LM head, and size the runs."""
        head = head_of(module)
        if not rewriter.rewrite("selection"):
            return
        symbol = name_of(KEPT_LOGITS)
        kept = module.add_input(ir.val(symbol, shape=ir.Shape([symbol, 1]), dtype=ir.DataType.INT64), KEPT_LOGITS)
        module.dims[symbol] = Dim(symbol)
        b = rewriter.at(head[-1])
        count = b("Shape", kept, start=0, end=1)
        positions = b("Cast", module.port(POSITIONS), to=ir.DataType.INT32)
        last = b("ArgMax", positions, axis=1, keepdims=1, shape=["batch_size", 1], dtype=ir.DataType.INT64)
        first = b("Max", b("Sub", b("Add", last, b.const(1)), count), b.const(0))
        steps = b("Range", b.const(0), b("Squeeze", count), b.const(1), shape=[symbol], dtype=ir.DataType.INT64)
        columns = b("Add", first, steps, shape=["batch_size", symbol], dtype=ir.DataType.INT64)
        keep_columns(head, columns, symbol, rewriter)
        stuck = next((state for state in module.states if KINDS[state.kind].update != "append"), None)
        if stuck is not None:
            rewriter.missed(head[-1], f"no draft can be taken back: {stuck.input} keeps no token of its own")
        k = self.k if stuck is None else 1
        if any(s.phase == "prefill" and s.symbols["seq_len"] == k for s in module.specializations):
            raise PassError(
                f"k={k} is also the length of a prefill run, and hosts tell the two by their lengths "
                "(contract §4.2 and §14.2): choose another k, or another prefill_seq_len"
            )
        module.set_size("seq_len", lambda s: k if s.phase == "decode" else s.symbols["seq_len"])
        module.split(symbol, {"prefill": [1], "decode": [k]})
