"""Compute logits for one token of each row only: the last real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qeff_ir.errors import PassError
from qeff_ir.ir.module import Module
from qeff_ir.ir.ports import LOGITS, POSITIONS
from qeff_ir.passing.base import Pass, Phase, Rewriter, register
from qeff_ir.passing.expect import Exactly, Expect
from qeff_ir.passing.selection import head_of, keep_columns


@register
@dataclass(frozen=True, slots=True)
class LastLogits(Pass):
    """Keep the hidden state of each row's last real token, before the LM head; ``logits`` become ``[batch, 1, vocab]``.

    The last real token is the one with the greatest position, the first such column (AI 100 contract §1.2). A row of
    padding keeps its first column, whose logits mean nothing. A model without a cache returns what it returns.
    """

    name: ClassVar[str] = "last-logits"
    phase: ClassVar[Phase] = Phase.ADAPT
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"last-logits"})
    changes_interface: ClassVar[bool] = True
    expect: ClassVar[Expect] = Exactly("num_decoders")

    def run(self, module: Module, rewriter: Rewriter) -> None:
        """Insert the selection at the LM head's input.

        Raises:
            PassError: ``logits`` do not come from a matrix product over the tokens, or are of one token already.
        """
        if not module.states:
            return
        logits = module.port(LOGITS)
        if logits.shape is not None and logits.shape[1] == 1:
            raise PassError("the logits are those of one token of each row already: last-logits has run before")
        head = head_of(module)
        if not rewriter.rewrite("selection"):
            return
        b = rewriter.at(head[-1])
        positions = b("Cast", module.port(POSITIONS), to=ir.DataType.INT32)
        keep_columns(head, b("ArgMax", positions, axis=1, keepdims=1), 1, rewriter)
