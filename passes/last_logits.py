"""Compute logits for the last real tokens of each row only: one, or as many as a decode run verifies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Dim, Module
from qeff_ir.ir.ports import KEPT_LOGITS, LOGITS, POSITIONS, name_of
from qeff_ir.passing.base import OpBuilder, Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import Exactly, Expect
from qeff_ir.passing.options import whole_numbers
from qeff_ir.passing.selection import head_of, keep_columns


@register
@dataclass(frozen=True, slots=True)
class LastLogits(Pass):
    """Keep the hidden state of each row's last real token, before the LM head; ``logits`` become ``[batch, 1, vocab]``.

    The last real token is the one with the greatest position, the first such column (AI 100 contract §1.2). A row of
    padding keeps its first column, whose logits mean nothing. A model without a cache returns what it returns.

    With ``keep=4``, decode runs take 4 tokens, one that is certain and a draft of three, and return the logits of all
    of them, ``[batch, num_logits_to_keep, vocab]``; the length of the input ``num_logits_to_keep`` says how many. A
    draft that is rejected is overwritten by the next run. ``keep="1,4"`` makes decode runs of 1 and of 4 tokens. Where
    a state keeps no token of its own, no draft can be taken back: decode runs stay at one token. A number that is the
    length of a prefill run is refused.
    """

    name: ClassVar[str] = "last-logits"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"last-logits"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = Exactly("num_decoders")

    keep: int | str = field(default=1, metadata={"help": "tokens of a decode run; several numbers with commas"})

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Insert the selection at the LM head's input, and size the decode runs.

        Raises:
            PassError: ``logits`` do not come from a matrix product over the tokens, or are of the last tokens already;
                or `keep` is no number of tokens, or that of a prefill run.
        """
        sizes = whole_numbers(self.keep, "keep")
        if not module.states:
            return
        logits = module.port(LOGITS)
        if (logits.shape is not None and logits.shape[1] == 1) or module.find(KEPT_LOGITS) is not None:
            raise PassError("the logits are those of one token of each row already: last-logits has run before")
        head = head_of(module)
        if not rewriter.rewrite("selection"):
            return
        b = rewriter.at(head[-1])
        positions = b("Cast", module.port(POSITIONS), to=ir.DataType.INT32)
        last = b("ArgMax", positions, axis=1, keepdims=1)
        if sizes == [1]:
            keep_columns(head, last, 1, rewriter)
            return
        columns = _last_columns(module, last, b)
        keep_columns(head, columns, name_of(KEPT_LOGITS), rewriter)
        stuck = next((s for s in module.states if not (s.update == "append" or s.written_by_host)), None)
        if stuck is not None:
            rewriter.missed(head[-1], f"no draft can be taken back: {stuck.input} keeps no token of its own")
        _size_runs(module, sizes if stuck is None else [1])


def _last_columns(module: Module, last: ir.Value, b: OpBuilder) -> ir.Value:
    """The columns of the last tokens, ``[batch, num_logits_to_keep]``, from the first on where a row has fewer."""
    symbol = name_of(KEPT_LOGITS)
    kept = module.add_input(ir.val(symbol, shape=ir.Shape([symbol, 1]), dtype=ir.DataType.INT64), KEPT_LOGITS)
    module.dims[symbol] = Dim(symbol)
    count = b("Shape", kept, start=0, end=1)
    first = b("Max", b("Sub", b("Add", last, b.const(1)), count), b.const(0))
    steps = b("Range", b.const(0), b("Squeeze", count), b.const(1), shape=[symbol], dtype=ir.DataType.INT64)
    return b("Add", first, steps, shape=["batch_size", symbol], dtype=ir.DataType.INT64)


def _size_runs(module: Module, sizes: list[int]) -> None:
    """One logit in prefill; decode runs of each size, which return as many as they take.

    Raises:
        PassError: A size is that of a prefill run.
    """
    symbol = name_of(KEPT_LOGITS)
    taken = {s.symbols["seq_len"] for s in module.specializations if s.phase == "prefill"}
    if both := taken.intersection(sizes):
        raise PassError(
            f"{both.pop()} tokens are also the length of a prefill run, and hosts tell the two by their lengths "
            "(contract §4.2 and §14.2): choose another number, or another prefill_seq_len"
        )
    module.split(symbol, {"prefill": [1], "decode": sizes})
    module.set_size("seq_len", lambda s: s.symbols["seq_len" if s.phase == "prefill" else symbol])
