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
from qeff_ir.passing.matching import depends_on

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity"})


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
        tail = _row_wise_tail(logits, set(module.graph.inputs))
        if not tail or tail[-1].op_type != "MatMul":
            raise PassError(
                "the logits are not a matrix product of one hidden state per token, so one token cannot be selected "
                "before the LM head"
            )
        if not rewriter.rewrite("selection"):
            return
        head = tail[-1]
        hidden = head.inputs[0]
        assert hidden is not None and hidden.shape is not None
        b = rewriter.at(head)
        positions = b("Cast", module.port(POSITIONS), to=ir.DataType.INT32)
        column = b("ArgMax", positions, axis=1, keepdims=1)
        index = b("Unsqueeze", column, b.const([2]))
        shape = ir.Shape([hidden.shape[0], 1, hidden.shape[2]])
        last = b("GatherND", hidden, index, batch_dims=1, shape=shape, dtype=hidden.dtype)
        head.replace_input_with(0, last)
        for node in tail:
            out = node.outputs[0]
            if out.shape is not None:
                out.shape = ir.Shape([out.shape[0], 1, *out.shape.dims[2:]])


def _row_wise_tail(logits: ir.Value, inputs: set[ir.Value]) -> list[ir.Node]:
    """Nodes from the logits up to the LM head, all of which treat each token by itself.

    What stands beside the logits in them is the same for every token: it depends on none of the graph's inputs.
    """
    tail: list[ir.Node] = []
    value = logits
    while (node := value.producer()) is not None:
        if node.op_type == "MatMul":
            weight = node.inputs[1]
            return [*tail, node] if weight is not None and not depends_on(weight, inputs) else tail
        data = [v for v in node.inputs if v is not None and depends_on(v, inputs)]
        if node.op_type not in _ELEMENTWISE or len(data) != 1:
            return tail
        tail.append(node)
        value = data[0]
    return tail
